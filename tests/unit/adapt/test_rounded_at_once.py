"""Rounding an adapter's numbers at once, and adding gradients where they belong, changes no bit."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode

from raylora.adapt.attach import Adapter, Attachment
from raylora.components.sites import site_of
from raylora.networks import get_network

SIZES = {"first": (12, 20), "conv": (20, 8), "last": (8, 10)}


class Small(nn.Module):
    """A linear layer, a 1x1 convolution and a linear layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 20), nn.Linear(8, 10, bias=False)
        self.conv = nn.Conv2d(20, 8, 1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        inner_BDT = silu(self.first(x_BTD)).transpose(1, 2)
        mixed = self.conv(inner_BDT.unflatten(2, (2, -1)))
        given: Tensor = self.last(mixed.flatten(2).mT)
        return given


def small(dtype: torch.dtype, *, scale: float, frozen: bool = False) -> tuple[Small, Adapter]:
    torch.manual_seed(0)
    model = Small().to(dtype).requires_grad_(False)
    found = [
        site_of(f"m.{name}", getattr(model, name), role="attention", section="", number=0)
        for name in SIZES
    ]
    sites = [site for site in found if site is not None]
    draw = np.random.default_rng(0)
    adapter = Adapter(
        get_network("lora"),
        sites,
        {
            site.name: {
                "down": draw.normal(size=(4, site.inputs)),
                "up": draw.normal(size=(site.outputs, 4)),
            }
            for site in sites
        },
        {site.name: scale for site in sites},
        dtype=torch.float32,
        device=torch.device("cpu"),
        constants={site.name: frozenset({"down"} if frozen else ()) for site in sites},
    )
    Attachment(model, "m", adapter)
    return model, adapter


def passed(
    model: Small, adapter: Adapter, dtype: torch.dtype, *, at_once: bool
) -> tuple[Tensor, ...]:
    x = torch.linspace(-2, 2, 2 * 6 * 12).view(2, 6, 12).to(dtype).requires_grad_(True)
    given = x
    for _ in range(2):  # gradients of two passes are added up
        with adapter.rounded_to(dtype) if at_once else nullcontext():
            given = model(x)
            (given.float() ** 2).mean().backward()
    assert x.grad is not None
    return given.detach(), x.grad, adapter.gradients.clone()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_at_once_gives_the_bits_of_rounding_each(
    dtype: torch.dtype, scale: float, frozen: bool
):
    found = []
    for at_once in (False, True):
        model, adapter = small(dtype, scale=scale, frozen=frozen)
        found.append(passed(model, adapter, dtype, at_once=at_once))
        assert adapter.gradients.any()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_values_that_moved_are_rounded_anew_in_the_next_pass():
    model, adapter = small(torch.bfloat16, scale=1.0)
    passed(model, adapter, torch.bfloat16, at_once=True)
    fresh, other = small(torch.bfloat16, scale=1.0)
    for one in (adapter, other):
        with torch.no_grad():
            one.values.data.mul_(1.5)  # as pieces of it are moved
        one.gradients.zero_()
    found = passed(model, adapter, torch.bfloat16, at_once=True)
    for one, same in zip(found, passed(fresh, other, torch.bfloat16, at_once=False), strict=True):
        assert torch.equal(one, same)


def test_it_is_the_papers_low_rank_change_in_float64():
    """W x + scale up(down(x)) and its gradients, by plain operations and autograd."""
    model, adapter = small(torch.float64, scale=0.7)
    x = torch.linspace(-1, 1, 72, dtype=torch.float64).view(1, 6, 12)
    leaves = {name: adapter.parameters[f"m.{name}"] for name in SIZES}
    model(x).square().sum().backward()
    wanted = {
        name: {
            word: leaf.detach().double().requires_grad_(True) for word, leaf in leaves[name].items()
        }
        for name in SIZES
    }
    weights = {
        name: getattr(model, name).weight.flatten(1)
        + 0.7 * wanted[name]["up"] @ wanted[name]["down"]
        for name in SIZES
    }
    inner = silu(x @ weights["first"].T + model.first.bias)
    mixed = inner @ weights["conv"].T + model.conv.bias
    (mixed @ weights["last"].T).square().sum().backward()
    for name in SIZES:
        for word, leaf in leaves[name].items():
            # the adapter's own numbers and gradients are float32
            torch.testing.assert_close(
                leaf.grad, wanted[name][word].grad.float(), rtol=1e-5, atol=1e-5
            )


class Count(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_pass_casts_nothing_layer_by_layer():
    counts = {}
    for at_once in (False, True):
        model, adapter = small(torch.bfloat16, scale=0.5)
        passed(model, adapter, torch.bfloat16, at_once=at_once)
        with Count() as count:
            passed(model, adapter, torch.bfloat16, at_once=at_once)
        counts[at_once] = count.found
    # two passes, three layers: two casts forward, two back, and autograd's of two gradients
    assert counts[False]["_to_copy"] - counts[True]["_to_copy"] == 2 * 3 * 6


def test_a_large_adapter_and_one_without_a_buffer_round_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch,
):
    model, adapter = small(torch.bfloat16, scale=1.0)
    monkeypatch.setattr("raylora.adapt.attach._ROUNDED_NUMBERS", len(adapter.values) - 1)
    passed(model, adapter, torch.bfloat16, at_once=True)
    assert adapter._copies is None
    monkeypatch.setattr("raylora.adapt.attach._ROUNDED_NUMBERS", len(adapter.values))
    before = adapter.gradients.clone()
    adapter.gradients.zero_()
    passed(model, adapter, torch.bfloat16, at_once=True)
    assert adapter._copies is not None
    assert torch.equal(adapter.gradients, before)
    adapter.keep_no_gradients()
    with adapter.rounded_to(torch.bfloat16):
        model(torch.ones(1, 6, 12, dtype=torch.bfloat16)).float().square().mean().backward()
    grads = [leaf.grad for held in adapter.parameters.values() for leaf in held.values()]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
    assert not len(adapter.gradients)
