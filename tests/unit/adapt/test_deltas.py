"""ΔW and its norms, against the dense computation."""

from __future__ import annotations

import numpy as np
import pytest
from adapters import random_module
from numpy.testing import assert_allclose

from raylora.adapt.deltas import at_scale, delta, delta_distance, delta_norm

SHAPES = [(6, 5), (7, 3, 1, 1), (4, 5, 3, 3), (2, 300)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_delta_is_scale_times_up_times_down(shape: tuple[int, ...]) -> None:
    down, up, scale = random_module("m", shape, rank=3, alpha=1.5).low_rank
    dense = 0.5 * np.tensordot(up.double().flatten(1).numpy(), down.double().numpy(), axes=1)
    assert delta(down, up, scale).shape == shape
    assert_allclose(delta(down, up, scale).numpy(), dense, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 9])  # 9: wider than some of the layers
def test_norms_without_the_matrix_are_those_of_the_matrix(
    shape: tuple[int, ...], rank: int
) -> None:
    first = random_module("m", shape, rank=rank, seed=1).low_rank
    second = random_module("m", shape, rank=2, seed=2).low_rank
    assert delta_norm([first]) == pytest.approx(float(delta(*first).norm()), rel=1e-13)
    distance = float((delta(*first) - delta(*second)).norm())
    assert delta_distance(first, second) == pytest.approx(distance, rel=1e-13)


def test_a_difference_in_the_twelfth_digit_is_seen() -> None:
    down, up, scale = random_module("m", (64, 64)).low_rank
    moved = up.double().clone()
    moved[3, 1] *= 1 + 1e-12
    distance = delta_distance((down, up, scale), (down, moved, scale))
    expected = abs(float(moved[3, 1] - up[3, 1])) * scale * float(down[1].double().norm())
    # float64's 1e-16 of a norm some 1e12 times larger than the difference, relative to it
    assert distance == pytest.approx(expected, rel=2e-2)
    assert delta_distance((down, up, scale), (down, up, scale)) < 1e-14


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.5, 1.0, 0.3, 7.0, -2.0])
def test_another_scale_gives_the_same_delta(shape: tuple[int, ...], scale: float) -> None:
    pair = random_module("m", shape, rank=3, alpha=1.5).low_rank
    down, up, found = at_scale(pair, scale)
    assert found == scale
    assert_allclose(delta(down, up, scale), delta(*pair), rtol=1e-13, atol=1e-17)
    grows = abs(scale) < 0.5
    assert (up.equal(pair[1].double()), down.equal(pair[0].double())) == (
        abs(scale) > 0.5 or scale == 0.5,
        grows or scale == 0.5,
    )
