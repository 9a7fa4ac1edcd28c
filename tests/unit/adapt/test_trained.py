"""What an adapter in training does to its layers."""

from __future__ import annotations

import numpy as np
import torch
from adapters import file_bytes, kohya_name
from torch import nn
from torch.nn.functional import conv2d, linear
from torch.testing import assert_close

from raylora.adapt.attach import Adapter
from raylora.adapt.deltas import delta
from raylora.adapt.lora_file import AdapterModule, read_adapter
from raylora.adapt.trained import trained
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
    made, found = adapter(), trained(adapter())
    generator = torch.Generator().manual_seed(0)
    for site in SITES:
        size = (2, site.inputs, 6, 6) if site.kind == "conv" else (2, site.inputs)
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        pair = found.low_rank(site)
        assert pair is not None
        weight = delta(*pair)
        if site.kind == "conv":
            wanted = conv2d(x, weight, stride=site.stride, padding=site.padding)
        else:
            wanted = linear(x, weight)
        layer = nn.Linear(1, 1)  # a low-rank change has no use for the frozen layer
        added = made.adapted(site, layer, x, torch.zeros_like(wanted))
        assert_close(added, wanted, rtol=0, atol=1e-12)
        frozen = torch.ones(weight.shape, dtype=torch.float64)
        merged = found.merged(site, {"weight": frozen})["weight"]
        assert_close(merged, frozen + weight, rtol=0, atol=1e-12)


def test_they_are_copies_of_this_moment() -> None:
    made = adapter()
    found = trained(made)
    before = {name: held["up"].clone() for name, held in found.parameters.items()}
    made.values.data.zero_()
    for name, held in found.parameters.items():
        assert torch.equal(held["up"], before[name])
        assert not held["up"].requires_grad


def test_they_are_what_the_file_says() -> None:
    made = adapter()
    modules = [AdapterModule(name, tensors) for name, tensors in made.modules().items()]
    file = read_adapter(file_bytes(modules, dtype=torch.float64))
    found = trained(made)
    assert found.kind == "lora"
    for site in SITES:
        held, pair = file.modules[kohya_name(site.name)], found.low_rank(site)
        assert pair is not None
        # alpha is float32, and the halves are rescaled to the alpha of most.
        assert_close(delta(*held.low_rank), delta(*pair), rtol=1e-6, atol=1e-12)
