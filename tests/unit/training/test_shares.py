"""Cutting a step over workers: all of it, in proportion, in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.training.shares import HOPE, HYSTERESIS, Shares, split

weights = st.lists(st.floats(0, 1e6), min_size=1, max_size=9).filter(lambda held: sum(held) > 1e-6)
counts = st.integers(0, 500)


@given(count=counts, weights=weights)
def test_every_image_is_computed_once(count: int, weights: list[float]):
    parts = split(count, weights)
    assert sum(parts) == count
    assert min(parts) >= 0


@given(count=counts, weights=weights)
def test_a_share_is_within_one_image_of_its_weight(count: int, weights: list[float]):
    total = sum(weights)
    for part, weight in zip(split(count, weights), weights, strict=True):
        assert abs(part - count * weight / total) < 1 + 1e-6


@given(count=counts, speeds=st.lists(st.integers(1, 1000), min_size=1, max_size=9))
def test_a_larger_weight_never_gets_less(count: int, speeds: list[int]):
    parts = [part for _, part in sorted(zip(speeds, split(count, speeds), strict=True))]
    assert parts == sorted(parts)


def test_what_rounding_leaves_goes_to_the_largest_remainders_then_to_lower_ranks():
    assert split(8, [1, 1, 1]) == [3, 3, 2]
    assert split(4, [3, 1]) == [3, 1]
    assert split(5, [3, 1]) == [4, 1]
    assert split(7, [0.5, 0.5]) == [4, 3]
    assert split(3, [0, 2, 1]) == [0, 2, 1]
    assert split(0, [1, 2]) == [0, 0]


@given(count=counts, weights=weights)
def test_the_workers_parts_follow_one_another(count: int, weights: list[float]):
    shares = Shares(len(weights), pinned=weights)
    images = list(range(count))
    joined = [i for rank in range(len(weights)) for i in images[shares.mine(rank, count)]]
    assert joined == images


def test_measured_shares_begin_equal_and_follow_the_speeds():
    shares = Shares(2)
    assert shares.weights == [0.5, 0.5]
    assert shares.refit([30.0, 10.0])
    assert shares.weights == [0.75, 0.25]


def test_jitter_moves_nothing():
    shares = Shares(4)
    step = HYSTERESIS / 4
    assert not shares.refit([0.25 + step * 0.9, 0.25 - step * 0.9, 0.25, 0.25])
    assert shares.weights == [0.25] * 4
    assert shares.refit([0.25 + step * 1.1, 0.25 - step * 1.1, 0.25, 0.25])
    settled = list(shares.weights)
    assert not shares.refit([0.25 + step * 0.3, 0.25 - step * 0.3, 0.25, 0.25])
    assert shares.weights == settled


def test_pinned_shares_never_move():
    shares = Shares(2, pinned=[3.0, 1.0])
    assert not shares.refit([1.0, 100.0])
    assert shares.weights == [3.0, 1.0]


def test_a_worker_of_unknown_speed_is_taken_for_the_fastest():
    shares = Shares(3)
    assert shares.refit([30.0, 0.0, 15.0])
    assert shares.weights == [0.4, 0.4, 0.2]
    assert not Shares(2).refit([0.0, 0.0])


def test_a_worker_that_was_slow_for_a_while_gets_images_again():
    workers = [Shares(2), Shares(2)]
    speeds = [40.0, 0.5]
    counts = []
    for interval in range(60):
        speeds[1] = 0.5 if interval < 5 else 40.0
        for rank, shares in enumerate(workers):
            held = range(4)[shares.mine(rank, 4)]
            shares.note(len(held), len(held) / speeds[rank])
        counts.append(split(4, workers[0].weights)[1])
        taken = [shares.take_speed() for shares in workers]
        for shares in workers:
            shares.refit(taken)
    assert 0 in counts
    assert counts[-1] == 2


def test_a_speed_is_taken_over_all_that_was_noted_since_the_last_time():
    shares = Shares(2)
    assert shares.take_speed() == 0.0
    shares.note(4, 1.0)
    shares.note(2, 3.0)
    assert shares.take_speed() == pytest.approx(1.5)


def test_without_images_the_last_known_speed_rises_slowly():
    shares = Shares(2)
    shares.note(4, 1.0)
    assert [shares.take_speed() for _ in range(3)] == pytest.approx([4.0, 4 * HOPE, 4 * HOPE**2])
