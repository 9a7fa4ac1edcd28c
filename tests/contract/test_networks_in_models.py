"""Every network on whole models, and through files: what people get is what was trained."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from adapters import fresh_adapter
from bases import open_tiny
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.adapt.attach import Adapter, Attachment
from raylora.base.layers import chosen_sites
from raylora.base.lookup import plugins
from raylora.base.site import Site
from raylora.families import Family
from raylora.networks import get_network

CPU = torch.device("cpu")
every_kind = pytest.mark.parametrize("kind", plugins("raylora.networks"))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def adapter_for(kind: str, family: Family, denoiser: nn.Module, size: float) -> Adapter:
    """One on every layer that the options choose, as if it had been trained: all is moved."""
    network = get_network(kind)
    options = network.options(rank=2, alpha=3.0)
    sites = chosen_sites(
        options,
        family.sites(denoiser),
        convolutions=options.convolutions and family.blocks[1] > 0,
        blocks=family.blocks,
        ends=family.block_ends,
    )
    adapter = fresh_adapter(
        network,
        options,
        [site for site in sites if network.fits(options, site) is None],
        seed=0,
        dtype=torch.float64,
        device=CPU,
        models={family.component: denoiser},
    )
    with torch.no_grad():
        adapter.values += size * normal(5, *adapter.values.shape)
    return adapter


@cache
def tiny(kind: str) -> tuple[Family, nn.Module]:
    family = open_tiny(kind)
    return family, family.load_denoiser(dtype=torch.float64, device=CPU)


@pytest.fixture(params=plugins("raylora.families"))
def whole_model(request: pytest.FixtureRequest) -> tuple[Family, nn.Module, Any]:
    """(family, its denoiser in fp64, a prediction of it)."""
    family, denoiser = tiny(request.param)
    side = 2 * family.size_step // family.pixels_per_latent
    latents = normal(1, 2, family.latent_channels, side, side)
    told = {
        word: torch.from_numpy(array).double()
        for word, array in family.load_encoder(device=CPU).encode_texts(["a cat", ""]).items()
    }
    if family.wants_geometry:
        told["geometry"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, -1)
    whole = family.process.prediction != "flow"
    timesteps = torch.tensor([10, 900]) if whole else torch.tensor([10.0, 900.0])

    def predict(model: nn.Module) -> Tensor:
        return family.predict(model, latents, timesteps, told)

    return family, denoiser, predict


def put_in(layer: nn.Module, adapter: Adapter, site: Site) -> None:
    """Make the adapter part of a layer's weights."""
    held = {word: weight.detach().double() for word, weight in layer.named_parameters()}
    parameters, scale = adapter.parameters[site.name], adapter.scales[site.name]
    for word, weight in adapter.network.merged(parameters, site, scale, held).items():
        layer.get_parameter(word).copy_(weight)


@pytest.mark.slow
@every_kind
def test_on_a_whole_model_it_is_its_merged_weights(kind: str, whole_model: Any):
    family, denoiser, predict = whole_model
    adapter = adapter_for(kind, family, denoiser, 0.2)
    attachment = Attachment(denoiser, family.component, adapter)
    with torch.no_grad():
        adapted = predict(denoiser)
        attachment.detach()
        base = predict(denoiser)
        merged = copy.deepcopy(denoiser)
        for site in adapter.sites:
            layer = merged.get_submodule(site.name.removeprefix(f"{family.component}."))
            put_in(layer, adapter, site)
        expected = predict(merged)
    assert (adapted - base).norm() > 0.02 * base.norm()
    assert_close(adapted, expected, rtol=0, atol=1e-10)  # fp64, some 60 layers


def idle_layers(family: Family, denoiser: nn.Module, predict: Any, sites: list[Site]) -> set[str]:
    """Layers that the prediction does not depend on, in the base itself."""
    copied = copy.deepcopy(denoiser).requires_grad_(True)
    predict(copied).square().sum().backward()
    found = set()
    for site in sites:
        layer = copied.get_submodule(site.name.removeprefix(f"{family.component}."))
        weight = layer.get_parameter("weight")
        if weight.grad is None or not weight.grad.any():
            found.add(site.name)
    return found


@pytest.mark.slow
@every_kind
def test_gradient_reaches_every_parameter(kind: str, whole_model: Any):
    family, denoiser, predict = whole_model
    adapter = adapter_for(kind, family, denoiser, 0.05)
    idle = idle_layers(family, denoiser, predict, adapter.sites)
    # SD 3's last block throws the text's own attention away, and so what its queries are.
    assert all(name.endswith("attn.add_q_proj") for name in idle), idle
    assert len(idle) <= (family.component == "transformer")
    attachment = Attachment(denoiser, family.component, adapter)
    predict(denoiser).square().sum().backward()
    attachment.detach()
    for site, held in adapter.parameters.items():
        for word, leaf in held.items():
            if not leaf.requires_grad or site in idle:
                continue
            assert leaf.grad is not None
            assert leaf.grad.abs().max() > 0, f"{site} {word}"
    assert adapter.values.grad is adapter.gradients
    assert all(weight.grad is None for weight in denoiser.parameters())
