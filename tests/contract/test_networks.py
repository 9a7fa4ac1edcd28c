"""Every network, found by listing: what the trainer, the file and the preview rely on."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from adapters import fresh_adapter
from bases import TINY, open_tiny
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.adapt.attach import Adapter, Attachment
from raylora.adapt.dropout import Dropout
from raylora.adapt.keys import Naming, kohya_name
from raylora.adapt.lora_file import AdapterModule, adapter_bytes, read_adapter
from raylora.base.lookup import plugins
from raylora.base.site import Site
from raylora.families import Family
from raylora.networks import Gate, Network, NetworkOptions, get_network
from raylora.serving.library import adapter_on

KINDS = plugins("raylora.networks")
CPU = torch.device("cpu")
SITES = [
    Site("toy.tokens", "linear", 6, 5),
    Site("toy.pixels", "conv", 6, 4),
    Site("toy.kernel", "conv", 6, 4, kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_site = pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)


class Toy(nn.Module):
    """A linear layer, a 1x1 convolution and one that halves, with and without a bias."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.tokens = nn.Linear(6, 5, dtype=dtype)
        self.pixels = nn.Conv2d(6, 4, 1, bias=False, dtype=dtype)
        self.kernel = nn.Conv2d(6, 4, 3, stride=2, padding=1, dtype=dtype)
        with torch.no_grad():
            for seed, weight in enumerate(self.parameters()):
                weight.copy_(normal(seed, *weight.shape, dtype=dtype))
        self.requires_grad_(False)

    def forward(self, tokens: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        return self.tokens(tokens), self.pixels(pixels), self.kernel(pixels)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return normal(10, 2, 3, 6, dtype=dtype), normal(11, 2, 6, 3, 2, dtype=dtype)


def options_for(kind: str) -> NetworkOptions:
    """Small, and with a strength that is not 1."""
    return get_network(kind).options(rank=2, alpha=3.0)


def adapter_for(
    kind: str, dtype: torch.dtype = torch.float64, *, sites: list[Site] = SITES, seed: int = 0
) -> Adapter:
    network, options = get_network(kind), options_for(kind)
    return fresh_adapter(network, options, sites, seed=seed, dtype=dtype, device=CPU)


def moved(adapter: Adapter, size: float = 0.3) -> Adapter:
    """The adapter as if it had been trained: every number moved."""
    with torch.no_grad():
        adapter.values += size * normal(5, *adapter.values.shape, dtype=adapter.values.dtype)
    return adapter


def site_forward(
    adapter: Adapter, site: Site, x: Tensor, base: Tensor, gate: Gate | None = None
) -> Tensor:
    network: Network = adapter.network
    held = adapter.parameters[site.name]
    return network.forward(held, x, base, adapter.scales[site.name], site, gate)


def site_input(site: Site, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(x, what the frozen layer gave)."""
    x = inputs(dtype)[0 if site.kind == "linear" else 1]
    sides = (2, 1) if site.stride == (2, 2) else (3, 2)
    shape = (2, 3, site.outputs) if site.kind == "linear" else (2, site.outputs, *sides)
    return x, normal(12, *shape, dtype=dtype)


def change_of_weight(adapter: Adapter, site: Site) -> Tensor:
    """ΔW (O, I kh kw) in float64, column by column, from the network's own forward."""
    eye = torch.eye(site.inputs * math.prod(site.kernel), dtype=torch.float64)
    held = {word: leaf.detach().double() for word, leaf in adapter.parameters[site.name].items()}
    scale = adapter.scales[site.name]
    if site.kind == "linear":
        nothing = torch.zeros(site.inputs, site.outputs, dtype=torch.float64)
        return adapter.network.forward(held, eye, nothing, scale, site, None).T
    nothing = torch.zeros(len(eye), site.outputs, 1, 1, dtype=torch.float64)
    pictures = eye.view(-1, site.inputs, *site.kernel)
    alone = replace(site, stride=(1, 1), padding=(0, 0))
    return adapter.network.forward(held, pictures, nothing, scale, alone, None)[:, :, 0, 0].T


@every_kind
def test_its_file_name_is_its_word_and_its_class_says_what_it_is(kind: str):
    options = get_network(kind).options
    assert options().kind == kind
    assert options.__doc__
    assert issubclass(options, NetworkOptions)


@every_kind
def test_a_fresh_adapter_changes_nothing(kind: str):
    model = Toy(torch.float64)
    before = model(*inputs())
    Attachment(model, "toy", adapter_for(kind))
    for after, held in zip(model(*inputs()), before, strict=True):
        assert_close(after, held, rtol=0, atol=1e-6)


@every_kind
def test_the_base_comes_back(kind: str):
    model = Toy(torch.float64)
    before = model(*inputs())
    adapter = moved(adapter_for(kind))
    attachment = Attachment(model, "toy", adapter)
    changed = model(*inputs())
    assert all(not torch.allclose(a, b) for a, b in zip(changed, before, strict=True))
    adapter.strength = 0.0
    assert all(map(torch.equal, model(*inputs()), before))
    adapter.strength = 1.0
    assert all(map(torch.equal, model(*inputs()), changed))
    with adapter.off():
        assert all(map(torch.equal, model(*inputs()), before))
    assert all(map(torch.equal, model(*inputs()), changed))
    attachment.adapter = None
    assert all(map(torch.equal, model(*inputs()), before))
    attachment.adapter = adapter
    attachment.detach()
    assert all(map(torch.equal, model(*inputs()), before))


@every_kind
def test_first_weights_come_from_the_seed_and_the_layers_name(kind: str):
    first, again, other = (adapter_for(kind, seed=seed).values for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    more = [Site("toy.before", "linear", 6, 5), *SITES]
    assert torch.equal(adapter_for(kind, sites=more, seed=3).values[-len(first) :], first)
    renamed = [Site("toy.renamed", "linear", 6, 5)]
    held = adapter_for(kind, sites=renamed, seed=3).values
    assert not torch.equal(held, first[: len(held)])


def masked(hidden: Tensor) -> Tensor:
    """A gate that leaves out half of the numbers."""
    return hidden * ((normal(13, *hidden.shape) > 0) / 0.5)


@every_kind
@every_site
@pytest.mark.parametrize("gate", [None, masked], ids=["open", "gate"])
def test_its_gradients_are_those_of_finite_differences(kind: str, site: Site, gate: Gate | None):
    adapter = moved(adapter_for(kind))
    words = list(adapter.parameters[site.name])
    leaves = [adapter.parameters[site.name][word].detach().requires_grad_() for word in words]
    x, base = (tensor.requires_grad_() for tensor in site_input(site))

    def adapted(x: Tensor, base: Tensor, *leaves: Tensor) -> Tensor:
        held = dict(zip(words, leaves, strict=True))
        return adapter.network.forward(held, x, base, 0.7, site, gate)

    assert torch.autograd.gradcheck(adapted, (x, base, *leaves))


def rank_axis(site: Site) -> int:
    return 1 if site.kind == "conv" else -1


@every_kind
@every_site
def test_a_gate_gets_the_ranks_and_what_it_leaves_out_is_not_added(kind: str, site: Site):
    adapter = moved(adapter_for(kind))
    x, base = site_input(site)
    rank = options_for(kind).rank_at(site)
    whole = site_forward(adapter, site, x, base)
    shapes: list[tuple[int, ...]] = []

    def only(place: int) -> Gate:
        def gate(hidden: Tensor) -> Tensor:
            shapes.append(tuple(hidden.shape))
            kept = torch.zeros(hidden.shape[rank_axis(site)], dtype=hidden.dtype)
            kept[place] = 2.0
            return hidden * (kept[:, None, None] if site.kind == "conv" else kept)

        return gate

    parts = [site_forward(adapter, site, x, base, only(place)) - base for place in range(rank)]
    assert {shape[rank_axis(site)] for shape in shapes} == {rank}
    assert {shape[0] for shape in shapes} == {len(x)}
    assert all(part.abs().max() > 0.01 for part in parts)
    # Each rank alone, doubled: together they are twice what all of them add.
    assert_close(sum(parts), 2 * (whole - base), rtol=0, atol=1e-12)
    assert_close(site_forward(adapter, site, x, base, lambda h: h), whole, rtol=0, atol=1e-12)
    assert torch.equal(site_forward(adapter, site, x, base, lambda h: h * 0), base)


@every_kind
@every_site
def test_the_adapter_has_the_width_and_the_strength_of_its_options_at_a_layer(
    kind: str, site: Site
):
    class Own(get_network(kind).options):  # type: ignore[misc]
        def rank_at(self, site: Site) -> int:
            return 3 if site.kind == "linear" else 5

        def scale_at(self, site: Site) -> float:
            return 0.5 if site.kind == "linear" else 0.25

    rank, scale = (3, 0.5) if site.kind == "linear" else (5, 0.25)
    network = get_network(kind)
    adapter = fresh_adapter(
        network, Own(rank=2, alpha=3.0), [site], seed=0, dtype=torch.float64, device=CPU
    )
    assert adapter.scales == {site.name: scale}
    moved(adapter)
    x, base = site_input(site)
    widths: list[int] = []

    def look(hidden: Tensor) -> Tensor:
        widths.append(hidden.shape[rank_axis(site)])
        return hidden

    once = site_forward(adapter, site, x, base, look) - base
    assert widths == [rank]
    adapter.scales[site.name] *= 2
    assert_close(site_forward(adapter, site, x, base) - base, 2 * once, rtol=0, atol=1e-12)
    (tensors,) = adapter.modules().values()
    assert float(tensors["alpha"]) == 2 * scale * rank


@every_kind
@every_site
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout_keeps_16_bit_activations(kind: str, site: Site, dtype: torch.dtype):
    adapter = moved(adapter_for(kind, torch.float32))
    adapter.dropout = Dropout(get_network(kind).options(rank_dropout=0.3, dropout=0.3), seed=0)
    x, base = site_input(site, dtype)
    with adapter.dropping(0, [1, 2]):
        gate = adapter.dropout.gate(site)
        adapted = site_forward(adapter, site, x.requires_grad_(), base, gate)
    assert (adapted.dtype, adapted.shape) == (dtype, base.shape)
    adapted.sum().backward()
    assert adapter.gradients.any()
    assert torch.isfinite(adapter.gradients).all()


@every_kind
@every_site
def test_its_forward_is_pure(kind: str, site: Site):
    adapter = moved(adapter_for(kind))
    x, base = site_input(site)
    held = [t.clone() for t in (x, base, adapter.values.detach())]
    first = site_forward(adapter, site, x, base)
    assert torch.equal(site_forward(adapter, site, x, base), first)
    assert all(map(torch.equal, (x, base, adapter.values.detach()), held))
    assert adapter.gradients.count_nonzero() == 0


@every_kind
@every_site
def test_a_samples_output_does_not_depend_on_its_mates(kind: str, site: Site):
    adapter = moved(adapter_for(kind))
    x, base = site_input(site)
    together = site_forward(adapter, site, x, base)
    for i in range(len(x)):
        alone = site_forward(adapter, site, x[i : i + 1], base[i : i + 1])
        assert_close(alone[0], together[i], rtol=0, atol=1e-13)


@every_kind
@every_site
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_stay_so_and_finite(kind: str, site: Site, dtype: torch.dtype):
    adapter = moved(adapter_for(kind, torch.float32))
    x, base = site_input(site, dtype)
    adapted = site_forward(adapter, site, x.requires_grad_(), base)
    assert (adapted.dtype, adapted.shape) == (dtype, base.shape)
    exact = site_forward(adapter, site, x.detach().float(), base.float())
    # bf16 has 8 bits of mantissa; sums of 6 numbers around 1
    assert_close(adapted.float(), exact, rtol=3e-2, atol=5e-2)
    adapted.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.isfinite(adapter.gradients).all()
    assert adapter.gradients.dtype == torch.float32


@every_kind
@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_file_holds_the_same_change_of_weight(kind: str, dtype: torch.dtype, naming: Naming):
    sites = [replace(site, name=f"unet.{site.name}") for site in SITES]
    adapter = moved(adapter_for(kind, dtype, sites=sites))
    exported = adapter.modules()
    modules = [AdapterModule(name, tensors) for name, tensors in exported.items()]
    file = adapter_bytes(modules, {}, dtype=torch.float32, naming=naming)
    read = read_adapter(file)
    assert read.naming == naming
    loaded = adapter_on(sites, file, dtype=torch.float64, device=CPU)
    assert len(read.modules) == len(sites)
    for site in sites:
        name = kohya_name(site.name)
        expected = change_of_weight(adapter, site)
        assert expected.abs().max() > 0.1
        # the file has 24 bits
        assert_close(read.delta(name).flatten(1), expected, rtol=1e-5, atol=1e-6)
        assert_close(change_of_weight(loaded, site), expected, rtol=1e-5, atol=1e-6)


def sites_for(kind: str, family: Family, denoiser: nn.Module) -> list[Site]:
    convolutions = get_network(kind).options.convolutions
    return family.sites(denoiser, "attention_mlp", convolutions=convolutions)


@cache
def tiny(kind: str) -> tuple[Family, nn.Module]:
    family = open_tiny(kind)
    return family, family.load_denoiser(dtype=torch.float64, device=CPU)


@pytest.fixture(params=sorted(TINY))
def whole_model(request: pytest.FixtureRequest) -> tuple[Family, nn.Module, Any]:
    """(family, its denoiser in fp64, a prediction of it)."""
    family, denoiser = tiny(request.param)
    side = 2 * family.size_step // family.pixels_per_latent
    latents = normal(1, 2, family.latent_channels, side, side)
    text = {
        word: torch.from_numpy(array).double()
        for word, array in family.load_encoder(device=CPU).encode_texts(["a cat", ""]).items()
    }

    def predict(model: nn.Module) -> Tensor:
        return family.predict(model, latents, torch.tensor([10, 900]), text)

    return family, denoiser, predict


@pytest.mark.slow
@every_kind
def test_on_a_whole_model_it_is_its_merged_weights(kind: str, whole_model: Any):
    family, denoiser, predict = whole_model
    sites = sites_for(kind, family, denoiser)
    adapter = moved(adapter_for(kind, sites=sites), size=0.2)
    attachment = Attachment(denoiser, family.component, adapter)
    with torch.no_grad():
        adapted = predict(denoiser)
        attachment.detach()
        base = predict(denoiser)
        merged = copy.deepcopy(denoiser)
        for site in sites:
            weight = merged.get_submodule(site.name.removeprefix(f"{family.component}.")).weight
            weight += change_of_weight(adapter, site).view(weight.shape)
        expected = predict(merged)
    assert (adapted - base).norm() > 0.1 * base.norm()
    assert_close(adapted, expected, rtol=0, atol=1e-10)  # fp64, some 60 layers


@pytest.mark.slow
@every_kind
def test_gradient_reaches_every_parameter(kind: str, whole_model: Any):
    family, denoiser, predict = whole_model
    adapter = moved(adapter_for(kind, sites=sites_for(kind, family, denoiser)), size=0.05)
    attachment = Attachment(denoiser, family.component, adapter)
    predict(denoiser).square().sum().backward()
    attachment.detach()
    for site, held in adapter.parameters.items():
        for word, leaf in held.items():
            assert leaf.grad is not None
            assert leaf.grad.abs().max() > 0, f"{site} {word}"
    assert adapter.values.grad is adapter.gradients
    assert all(weight.grad is None for weight in denoiser.parameters())
