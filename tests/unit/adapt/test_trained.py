"""What an adapter in training does to its layers."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import conv2d, linear
from torch.testing import assert_close

from raylora.adapt.attach import Adapter
from raylora.adapt.deltas import delta
from raylora.adapt.keys import kohya_name
from raylora.adapt.lora_file import AdapterModule, adapter_bytes, read_adapter
from raylora.adapt.trained import low_ranks
from raylora.base.site import Site
from raylora.networks import get_network

SITES = [
    Site("unet.mid_block.attentions.0.proj_in", "conv", 6, 4),
    Site("unet.mid_block.resnets.0.conv1", "conv", 4, 5, (3, 3), (1, 1), (1, 1)),
    Site("unet.down_blocks.0.downsamplers.0.conv", "conv", 5, 5, (3, 3), (2, 2), (1, 1)),
    Site("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "linear", 7, 3),
]


def adapter() -> Adapter:
    draw = np.random.default_rng(0).normal
    initial = {}
    for rank, site in enumerate(SITES, 2):
        size = site.kernel if site.kernel != (1, 1) else ()
        down, up = draw(size=(rank, site.inputs, *size)), draw(size=(site.outputs, rank))
        initial[site.name] = {"down": down, "up": up}
    scales = {site.name: 0.5 + index for index, site in enumerate(SITES)}
    cpu = torch.device("cpu")
    return Adapter(get_network("lora"), SITES, initial, scales, dtype=torch.float64, device=cpu)


def test_a_delta_is_what_the_network_adds_at_linears_and_all_convolutions() -> None:
    made, found = adapter(), low_ranks(adapter())
    generator = torch.Generator().manual_seed(0)
    for site in SITES:
        size = (2, site.inputs, 6, 6) if site.kind == "conv" else (2, site.inputs)
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        weight = delta(*found[site.name])
        if site.kind == "conv":
            wanted = conv2d(x, weight, stride=site.stride, padding=site.padding)
        else:
            wanted = linear(x, weight)
        held, scale = made.parameters[site.name], made.scales[site.name]
        added = made.network.forward(held, x, torch.zeros_like(wanted), scale, site, None)
        assert_close(added, wanted, rtol=0, atol=1e-12)


def test_they_are_copies_of_this_moment() -> None:
    made = adapter()
    found = low_ranks(made)
    before = {name: [half.clone() for half in pair[:2]] for name, pair in found.items()}
    made.values.data.zero_()
    for name, (down, up, _) in found.items():
        assert torch.equal(down, before[name][0])
        assert torch.equal(up, before[name][1])
        assert not down.requires_grad


def test_they_are_what_the_file_says() -> None:
    made = adapter()
    modules = [AdapterModule(name, tensors) for name, tensors in made.modules().items()]
    file = read_adapter(adapter_bytes(modules, {}, dtype=torch.float64))
    found = low_ranks(made)
    assert list(found) == [site.name for site in SITES]
    for name, pair in found.items():
        held = file.modules[kohya_name(name)]
        assert_close(delta(*held.low_rank), delta(*pair), rtol=1e-7, atol=0)  # alpha is float32
