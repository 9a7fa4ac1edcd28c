"""DoRA: its formula on both axes, what has a gradient, its file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from frozen_layers import LAYERS, Trained
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from raylora.networks import lora
from raylora.networks.dora import DoraOptions

ROUNDING = 1e-12  # float64 in another order
every_layer = pytest.mark.parametrize("name", LAYERS)
every_axis = pytest.mark.parametrize("axis", ["output", "input"])


def trained(name: str, **given: Any) -> Trained:
    return Trained(name, DoraOptions(**{"rank": 3, "alpha": 4.5, **given}))


def decomposed(one: Trained, axis: str, held: dict[str, Tensor], *, constant: bool) -> Tensor:
    """W' as the paper has it, number by number."""
    change = 1.5 * held["up"] @ held["down"].flatten(1)
    moved = one.frozen + change.view(one.frozen.shape)
    others = [d for d in range(moved.dim()) if d != ("output", "input").index(axis)]
    lengths = moved.square().sum(others, keepdim=True).sqrt()
    lengths = lengths.detach() if constant else lengths
    return held["dora_scale"].view(lengths.shape) * moved / lengths


@every_axis
@every_layer
def test_it_begins_at_the_lengths_of_the_weight_and_as_lora(name: str, axis: str):
    one = trained(name, axis=axis)
    others = [d for d in range(one.frozen.dim()) if d != ("output", "input").index(axis)]
    lengths = one.frozen.square().sum(others).sqrt()
    shape = (8, 1) if axis == "output" else (1, 12)
    assert_close(one.first["dora_scale"], lengths.view(shape), rtol=0, atol=ROUNDING)
    plain = Trained(name, lora.LoraOptions(rank=3)).first
    assert torch.equal(one.first["down"], plain["down"])
    assert not one.first["up"].any()
    assert_close(one.output(one.first), one.layer(one.x), rtol=0, atol=ROUNDING)


@every_axis
@every_layer
def test_the_output_is_that_of_directions_times_lengths(name: str, axis: str):
    one = trained(name, axis=axis)
    expected = decomposed(one, axis, one.held, constant=False)
    assert (expected - one.frozen).abs().max() > 0.1
    assert_close(one.output(), one.of_weight(expected), rtol=0, atol=ROUNDING)
    assert_close(one.merged()["weight"], expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("norm_gradient", [False, True])
@every_axis
@every_layer
def test_the_length_divided_by_has_a_gradient_where_asked(
    name: str, axis: str, norm_gradient: bool
):
    one = trained(name, axis=axis, norm_gradient=norm_gradient)
    leaves = {
        word: one.held[word].clone().requires_grad_() for word in ("down", "up", "dora_scale")
    }
    held = {**one.held, **leaves}
    weights = torch.linspace(-1, 1, one.layer(one.x).numel()).double()

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((output.flatten() * weights).sum(), list(leaves.values()))

    found = gradients(one.output(held))
    told = decomposed(one, axis, held, constant=not norm_gradient)
    other = decomposed(one, axis, held, constant=norm_gradient)
    assert_close(found, gradients(one.of_weight(told)), rtol=1e-10, atol=ROUNDING)
    assert not torch.allclose(found[1], gradients(one.of_weight(other))[1], rtol=1e-3)


def test_a_gate_leaves_out_the_directions_change_and_not_the_lengths():
    one = trained("tokens")
    bare = one.output(gate=lambda hidden: hidden * 0)
    moved = one.frozen + 1.5 * one.held["up"] @ one.held["down"]
    ratio = one.held["dora_scale"] / moved.norm(dim=1, keepdim=True)
    assert_close(bare, one.of_weight(ratio * one.frozen), rtol=0, atol=ROUNDING)


@every_axis
def test_a_row_of_zeros_stays_finite(axis: str):
    one = trained("tokens", axis=axis)
    with torch.no_grad():
        one.frozen[3] = 0
        one.frozen[:, 4] = 0
    others = 1 if axis == "output" else 0
    lengths = one.frozen.norm(dim=others, keepdim=True)
    held = {**one.first, "dora_scale": lengths}
    leaves = {word: leaf.clone().requires_grad_() for word, leaf in held.items()}
    output = one.output(leaves)
    assert_close(output, one.layer(one.x), rtol=0, atol=ROUNDING)
    output.sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves.values() if leaf.grad is not None)


@every_axis
@every_layer
def test_the_file_has_the_lengths_beside_loras_tensors(name: str, axis: str):
    one = trained(name, axis=axis)
    linear = (8, 1) if axis == "output" else (1, 12)
    assert one.file["dora_scale"].shape == (linear if name == "tokens" else (*linear, 1, 1))
    assert set(one.file) == {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}
    assert float(one.file["alpha"]) == 4.5
    assert_close(one.read()["weight"], one.merged()["weight"], rtol=0, atol=ROUNDING)


def test_it_has_loras_options_and_refuses_what_its_change_cannot_be():
    assert DoraOptions(rank=4, alpha=2.0, scaling="sqrt_rank").scale_at(trained("tokens").site) == 1
    with pytest.raises(ValidationError, match=r"network\.max_norm caps the product of two halves"):
        DoraOptions(max_norm=1.0)
    with pytest.raises(ValidationError, match=r"network\.module_dropout: dora has none"):
        DoraOptions(module_dropout=0.1)
    assert DoraOptions(dropout=0.1, rank_dropout=0.1).dropout == 0.1
