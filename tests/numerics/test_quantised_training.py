"""Training on a base in fewer bits: exactly that of its rounded weights, and near the full base's.

A base's error is that of its format on the weights (0.8 % int8, 2.7 % fp8, 9 % nf4; see
tests/unit/memory/test_bases.py). To first order predictions and gradients change in proportion to
the weights, through layers that damp as often as they amplify, and residual paths that change
nothing: so what is computed with the base may be wrong by no more than twice the weights' share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
from raylora.families import Family
from raylora.memory.bases import HeldLinear, hold_linears
from raylora.memory.placed import Placed
from raylora.memory.setting import BaseKind, Setting
from raylora.networks import get_network

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
OF_WEIGHTS: dict[BaseKind, float] = {"int8": 0.008, "fp8": 0.027, "nf4": 0.092}
every_kind = pytest.mark.parametrize("kind", OF_WEIGHTS)
two_families = pytest.mark.parametrize("family", ["sd15", "flux1"])
Optimizer = Callable[[Tensor], torch.optim.Optimizer]


def adamw(values: Tensor) -> torch.optim.Optimizer:
    return torch.optim.AdamW([values], lr=1e-3)


def sgd(values: Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD([values], lr=0.3)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def model_of(word: str, kind: BaseKind, dtype: torch.dtype) -> tuple[Family, nn.Module]:
    family = open_tiny(word)
    denoiser = family.load_denoiser(dtype=dtype, device=CPU)
    for unit in family.units(denoiser):
        hold_linears(unit, kind, CPU)
    return family, denoiser


def rounded(word: str, kind: BaseKind, dtype: torch.dtype) -> tuple[Family, nn.Module]:
    """Plain linears that have the weights which held ones bring back."""
    _, held = model_of(word, kind, dtype)
    family, plain = model_of(word, "full", dtype)
    layers = dict(held.named_modules())
    for name, layer in plain.named_modules():
        source = layers[name]
        if isinstance(source, HeldLinear):
            layer.get_parameter("weight").data.copy_(source.weight)
    return family, plain


@dataclass(frozen=True)
class Batch:
    """Four images, the same for every base."""

    family: Family
    latents: Tensor
    target: Tensor
    timesteps: Tensor
    told: Mapping[str, Tensor]

    def predicted(self, denoiser: nn.Module) -> Tensor:
        return self.family.predict(denoiser, self.latents, self.timesteps, self.told)

    def loss(self, denoiser: nn.Module) -> Tensor:
        """Summed over the images."""
        squares = (self.predicted(denoiser) - self.target).square()
        return squares.flatten(1).mean(1).sum()

    def part(self, images: slice) -> Batch:
        told = {word: tensor[images] for word, tensor in self.told.items()}
        latents, target = self.latents[images], self.target[images]
        return Batch(self.family, latents, target, self.timesteps[images], told)


def batch_of(family: Family, dtype: torch.dtype) -> Batch:
    captions = family.load_encoder(device=CPU).encode_texts(["a cat", "", "two birds", "rain"])
    told = {word: torch.from_numpy(array).to(dtype) for word, array in captions.items()}
    if family.wants_geometry:
        geometry = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(4, -1)
        told["geometry"] = geometry.to(dtype)
    timesteps = torch.tensor([10, 900, 400, 650])
    if family.process.prediction == "flow":
        timesteps = timesteps.float()
    latents, target = (normal(seed, 4, family.latent_channels, 8, 8).to(dtype) for seed in (1, 7))
    return Batch(family, latents, target, timesteps, told)


class Training:
    """A LoRA on a model, moved step by step."""

    def __init__(
        self, opened: tuple[Family, nn.Module], dtype: torch.dtype, make: Optimizer = adamw
    ) -> None:
        self.family, self.denoiser = opened
        self.dtype = dtype
        self.adapter = self._adapter()
        self.first = self.adapter.values.detach().clone()
        Attachment(self.denoiser, self.family.component, self.adapter)
        self.optimizer = make(self.adapter.values)
        self.batch = batch_of(self.family, dtype)
        self.losses: list[float] = []

    def _adapter(self) -> Adapter:
        network = get_network("lora")
        options = network.options(rank=4)
        sites = chosen_sites(
            options,
            self.family.sites(self.denoiser),
            convolutions=False,
            blocks=self.family.blocks,
            ends=self.family.block_ends,
        )
        sites = [site for site in sites if network.fits(options, site) is None]
        wide = torch.promote_types(self.dtype, torch.float32)
        return fresh_adapter(network, options, sites, seed=0, dtype=wide, device=CPU)

    def accumulate(self, *pieces: slice) -> Tensor:
        self.adapter.gradients.zero_()
        losses = []
        for piece in pieces:
            loss = self.batch.part(piece).loss(self.denoiser) / 4
            loss.backward()
            losses.append(float(loss.detach()))
        self.losses.append(sum(losses))
        return self.adapter.gradients.clone()

    def steps(self, count: int) -> Training:
        for _ in range(count):
            self.accumulate(slice(0, 4))
            self.optimizer.step()
        return self

    @property
    def moved(self) -> Tensor:
        return self.adapter.values.detach() - self.first


@every_kind
@pytest.mark.parametrize("family", plugins("raylora.families"))
def test_a_whole_models_prediction_is_as_near_as_its_weights(family: str, kind: BaseKind):
    opened = [model_of(family, one, torch.float32) for one in ("full", kind)]
    batch = batch_of(opened[0][0], torch.float32)
    with torch.no_grad():
        full, held = (batch.predicted(denoiser) for _, denoiser in opened)
    assert 0 < error(held, full) < 2 * OF_WEIGHTS[kind]


@every_kind
@two_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_as_a_full_base_of_the_weights_that_it_brings_back(
    family: str, kind: BaseKind, dtype: torch.dtype
):
    found = Training(model_of(family, kind, dtype), dtype).steps(3)
    expected = Training(rounded(family, kind, dtype), dtype).steps(3)
    assert found.losses == expected.losses
    assert torch.equal(found.moved, expected.moved)
    assert found.moved.any()


@every_kind
@two_families
def test_the_adapter_is_as_near_the_full_bases_as_the_weights_are(family: str, kind: BaseKind):
    # By plain gradient descent; Adam's first steps are signs, which tell nothing of how near.
    full, held = (
        Training(model_of(family, one, torch.float32), torch.float32, sgd).steps(8)
        for one in ("full", kind)
    )
    assert 0 < error(held.moved, full.moved) < 2 * OF_WEIGHTS[kind]


@every_kind
@two_families
def test_the_loss_falls_as_on_the_full_base(family: str, kind: BaseKind):
    full, held = (
        Training(model_of(family, one, torch.float32), torch.float32).steps(12)
        for one in ("full", kind)
    )
    falls = [one.losses[0] - one.losses[-1] for one in (full, held)]
    assert falls[0] > 0
    assert_close(falls[1], falls[0], rtol=2 * OF_WEIGHTS[kind], atol=0)


@every_kind
def test_a_resumed_training_is_the_unbroken_one(kind: BaseKind):
    unbroken, before, after = (
        Training(model_of("sd15", kind, torch.float32), torch.float32) for _ in range(3)
    )
    unbroken.steps(4)
    before.steps(2)
    after.adapter.values.data.copy_(before.adapter.values.data)
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    assert torch.equal(after.steps(2).moved, unbroken.moved)


@every_kind
@two_families
def test_micro_batches_add_up_to_the_whole_batch(family: str, kind: BaseKind):
    # float64 in another order; nf4 comes back by way of float32, the same for both.
    training = Training(model_of(family, kind, torch.float64), torch.float64)
    training.adapter.values.data.add_(0.02 * normal(3, len(training.first)))
    whole = training.accumulate(slice(0, 4))
    apart = training.accumulate(slice(0, 1), slice(1, 4))
    assert_close(apart, whole, rtol=1e-9, atol=1e-13)
    assert whole.any()


@every_kind
def test_streaming_a_held_base_changes_no_bit(kind: BaseKind):
    resident = Training(model_of("sd15", kind, torch.float32), torch.float32).steps(2)
    family, denoiser = model_of("sd15", "full", torch.float32)
    placed = Placed(denoiser, family.units(denoiser), device=CPU, base=kind)
    placed.apply(Setting(streamed=0.6))
    assert placed.streamed
    streamed = Training((family, denoiser), torch.float32).steps(2)
    assert torch.equal(streamed.moved, resident.moved)
    placed.close()


def test_every_way_of_holding_is_measured():
    assert {*OF_WEIGHTS} == {*plugins("raylora.memory.bases")}
