"""Multiresolution noise: interpolation as torch's, the sum as written by itself, its statistics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn.functional import interpolate
from torch.testing import assert_close

from raylora.base.seeds import draw_generator, draw_normal, uniforms
from raylora.diffusion.pyramid import enlarged, pyramid_noise

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "losses.json").read_text()
)["noise"]
side = st.integers(1, 17)


@settings(deadline=None)  # torch's first interpolation takes half a second
@given(own=st.tuples(side, side), wanted=st.tuples(side, side))
def test_enlarging_is_bilinear_interpolation(own: tuple[int, int], wanted: tuple[int, int]):
    field = np.random.default_rng(own).normal(size=(3, *own))
    theirs = interpolate(
        torch.from_numpy(field)[None], size=wanted, mode="bilinear", align_corners=False
    )[0]
    assert_close(torch.from_numpy(enlarged(field, *wanted)), theirs, rtol=0, atol=1e-12)


def test_a_field_of_the_same_size_stays_as_it_is():
    field = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    assert np.array_equal(enlarged(field, 6, 5), field)
    assert np.array_equal(
        enlarged(field[:, :1, :1], 3, 2), field[:, :1, :1].repeat(3, 1).repeat(2, 2)
    )


def plain(sample: int, shape: tuple[int, ...] = (4, 32, 24)) -> NDArray[np.float32]:
    return draw_normal(shape, seed=1, step=2, sample=sample, purpose="test")


def pyramid(sample: int, iterations: int, discount: float, **words: Any) -> NDArray[np.float32]:
    generator = draw_generator(1, 2, sample, "noise pyramid")
    return pyramid_noise(
        plain(sample, **words), generator, iterations=iterations, discount=discount
    )


@pytest.mark.parametrize(("high", "wide"), [(32, 24), (32, 3), (3, 32)])
@pytest.mark.parametrize(("iterations", "discount"), [(1, 0.3), (2, 0.9), (6, 0.3), (10, 0.8)])
def test_the_sum_is_that_of_fields_at_every_size(
    iterations: int, discount: float, high: int, wide: int
):
    shape = (4, high, wide)
    generator = draw_generator(1, 2, 7, "noise pyramid")
    ratios = 2 + 2 * uniforms(generator, iterations)
    total = torch.from_numpy(plain(7, shape)).double()
    for i in range(iterations):
        size = (max(1, int(high / ratios[i] ** i)), max(1, int(wide / ratios[i] ** i)))
        field = torch.from_numpy(generator.standard_normal((4, *size), dtype=np.float32)).double()
        total += discount**i * interpolate(field[None], size=(high, wide), mode="bilinear")[0]
        if 1 in size:
            break
    found = torch.from_numpy(pyramid(7, iterations, discount, shape=shape))
    assert found.dtype == torch.float32
    assert_close(found.double(), total / total.std(), rtol=0, atol=1e-6)  # rounded to float32


def test_each_samples_deviation_is_one_as_that_of_a_batch_in_sd_scripts():
    assert GOLDEN["pyramid_6_0p3_std"] == pytest.approx(1, rel=1e-6)
    means = []
    for sample in range(200):
        found = pyramid(sample, 6, 0.3, shape=(4, 8, 8)).astype(np.float64)
        assert found.std(ddof=1) == pytest.approx(1, rel=1e-6)
        means.append(found.mean())
    # sd-scripts' mean is one of 2 samples: within five deviations of a mean of two of ours
    spread = np.std(means)
    assert abs(GOLDEN["pyramid_6_0p3_mean"]) < 5 * spread / math.sqrt(2)
    assert abs(np.mean(means)) < 5 * spread / math.sqrt(200)


def test_neighbours_are_as_alike_as_the_fields_make_them():
    """Two fields only, the second at 1/r: shares of variance and likeness, worked out by torch."""
    discount, alike, expected = 0.8, [], []
    for sample in range(60):
        found = pyramid(sample, 2, discount, shape=(4, 32, 32)).astype(np.float64)
        alike.append((found[:, :, 1:] * found[:, :, :-1]).mean())
        generator = draw_generator(1, 2, sample, "noise pyramid")
        size = int(32 / (2 + 2 * uniforms(generator, 2)[1]))
        # (32, size) of one axis: what each pixel takes of each drawn number
        takes = interpolate(torch.eye(size, dtype=torch.float64)[:, None], size=32, mode="linear")[
            :, 0
        ].T.numpy()
        power = (takes @ takes.T).diagonal()
        high, beside = power.mean(), np.mean((takes[1:] * takes[:-1]).sum(1))
        variance = 2 + discount**2 * high * high
        expected.append(discount**2 * high * beside / variance)
    error = np.std(np.array(alike) - expected) / math.sqrt(60)
    assert np.mean(expected) > 0.08
    assert abs(np.mean(alike) - np.mean(expected)) < 5 * error


def test_a_picture_of_one_pixel_can_be_noised():
    assert np.isfinite(pyramid(0, 6, 0.3, shape=(4, 1, 1))).all()
    assert pyramid(0, 6, 0.3, shape=(4, 1, 9)).shape == (4, 1, 9)
