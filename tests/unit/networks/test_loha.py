"""LoHa: the Hadamard product, its first weights, its gradient, its file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from frozen_layers import LAYERS, Trained, normal
from pydantic import ValidationError
from torch.testing import assert_close

from raylora.networks.loha import LohaOptions, forward, initial, pure

ROUNDING = 1e-12  # float64 in another order
every_layer = pytest.mark.parametrize("name", LAYERS)


def trained(name: str, **given: Any) -> Trained:
    return Trained(name, LohaOptions(**{"rank": 3, "alpha": 4.5, **given}))


@every_layer
def test_the_change_is_a_product_number_by_number(name: str):
    one = trained(name)
    held, change = one.held, torch.zeros(8, one.frozen[0].numel(), dtype=torch.float64)
    for row in range(8):
        for column in range(change.shape[1]):
            first = held["hada_w1_a"][row] @ held["hada_w1_b"][:, column]
            second = held["hada_w2_a"][row] @ held["hada_w2_b"][:, column]
            change[row, column] = 1.5 * first * second
    expected = one.frozen + change.view(one.frozen.shape)
    assert change.abs().max() > 0.1
    assert_close(one.output(), one.of_weight(expected), rtol=0, atol=1e-11)
    assert_close(one.merged()["weight"], expected, rtol=0, atol=ROUNDING)
    assert_close(one.read()["weight"], expected, rtol=0, atol=ROUNDING)


def test_in_tuckers_form_each_factor_has_a_core_with_the_kernel():
    one = trained("kernel", tucker=True)
    factors = []
    for number in "12":
        core, outer, inner = (
            one.held[f"hada_{word}"] for word in (f"t{number}", f"w{number}_a", f"w{number}_b")
        )
        assert core.shape == (3, 3, 3, 3)
        factor = torch.zeros_like(one.frozen)
        for r in range(3):
            for s in range(3):
                spread = outer[r][:, None] * inner[s]
                factor += spread[:, :, None, None] * core[r, s]
        factors.append(factor)
    expected = one.frozen + 1.5 * factors[0] * factors[1]
    assert (expected - one.frozen).abs().max() > 1e-3
    assert_close(one.output(), one.of_weight(expected), rtol=0, atol=1e-11)
    assert_close(one.merged()["weight"], expected, rtol=0, atol=ROUNDING)
    assert_close(one.read()["weight"], expected, rtol=0, atol=ROUNDING)
    for name in ("tokens", "pixels"):
        assert trained(name, tucker=True).first.keys() == trained(name).first.keys()


def test_its_rank_may_reach_the_square_of_the_pairs():
    one = trained("tokens")
    assert torch.linalg.matrix_rank(one.merged()["weight"] - one.frozen) == 8


def test_first_weights_have_lycoris_spread_and_one_of_them_is_zero():
    site = trained("tokens").site
    generator = np.random.default_rng(0)
    found = initial(
        LohaOptions(rank=4000), site, lambda shape: generator.uniform(-1, 1, shape), lambda: None
    )  # type: ignore[arg-type, return-value]
    spreads = {word: float(array.std()) for word, array in found.items()}
    expected = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
    assert spreads == pytest.approx(expected, rel=0.02)


def test_its_gradient_remembers_no_matrix_of_the_layers_size():
    one = trained("tokens")
    leaves = {word: leaf.clone().requires_grad_() for word, leaf in one.held.items()}
    sizes: list[tuple[int, ...]] = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        output = forward(leaves, one.call())
    assert sizes.count((8, 12)) <= 1  # the change itself, for the gradient of x
    weights = normal(3, *output.shape)
    found = torch.autograd.grad((output * weights).sum(), list(leaves.values()))
    expected = torch.autograd.grad(
        (pure(leaves, one.call()) * weights).sum(), list(leaves.values())
    )
    assert_close(found, expected, rtol=1e-11, atol=ROUNDING)


def test_the_file_has_lycoris_words():
    assert {word: tuple(t.shape) for word, t in trained("kernel").file.items()} == {
        "hada_w1_a": (8, 3),
        "hada_w1_b": (3, 108),
        "hada_w2_a": (8, 3),
        "hada_w2_b": (3, 108),
        "alpha": (),
    }
    assert float(trained("tokens").file["alpha"]) == 4.5


def test_dropout_of_ranks_is_refused():
    with pytest.raises(ValidationError, match=r"network\.rank_dropout: loha has none"):
        LohaOptions(rank_dropout=0.1)
    assert LohaOptions(module_dropout=0.1).module_dropout == 0.1
