"""Regularisation images: as many showings as the others, counted as sd-scripts counts them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.data.balance import balanced_repeats


def counted_one_by_one(repeats: list[int], target: int) -> list[int]:
    """The rule as it is told: take images in order; when all are taken, go round adding one."""
    shown, total = [0] * len(repeats), 0
    for number, repeat in enumerate(repeats):
        if total < target:
            shown[number] = repeat
            total += repeat
    while repeats and total < target:
        for number in range(len(repeats)):
            if total < target:
                shown[number] += 1
                total += 1
    return shown


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 150))
def test_the_closed_form_is_the_loop(repeats: list[int], target: int):
    found = balanced_repeats(np.array(repeats, dtype=np.int64), target)
    assert found.tolist() == counted_one_by_one(repeats, target)
    assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("repeats", "target", "shown"),
    [
        ([1] * 5, 3, [1, 1, 1, 0, 0]),  # too many: the last are not shown
        ([2, 2, 1, 1, 1], 6, [2, 2, 1, 1, 0]),
        ([4, 4], 6, [4, 4]),  # the last one taken overshoots
        ([4, 4], 7, [4, 4]),
        ([4, 4], 4, [4, 0]),
        ([1, 1, 1], 14, [5, 5, 4]),  # too few: round after round, one each
        ([3, 1], 5, [4, 1]),
        ([3, 1], 0, [0, 0]),
        ([], 6, []),
    ],
)
def test_showings_of_small_cases(repeats: list[int], target: int, shown: list[int]):
    assert balanced_repeats(np.array(repeats, dtype=np.int64), target).tolist() == shown


def test_the_repeats_given_stay_as_they_are():
    repeats = np.array([2, 2], dtype=np.int64)
    balanced_repeats(repeats, 9)
    assert repeats.tolist() == [2, 2]


def test_a_million_images_take_well_under_a_second():
    repeats = np.full(1_000_000, 2, dtype=np.int64)
    began = time.perf_counter()
    assert balanced_repeats(repeats, 10**9).sum() == 10**9
    assert balanced_repeats(repeats, 10**6).sum() == 10**6
    assert time.perf_counter() - began < 0.5
