"""Work ahead of the loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from raylora.data.prefetch import Prefetcher, map_ahead


def threads_left() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_results_come_in_order_with_their_items():
    with Prefetcher(range(20), lambda number: number * number) as steps:
        assert list(steps) == [(number, number * number) for number in range(20)]
    assert threads_left() == 0


def test_no_more_than_asked_for_is_ahead():
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with Prefetcher(items(), lambda number: number, ahead=3) as steps:
        for number, _ in steps:
            assert len(taken) <= number + 1 + 3
            if number == 10:
                break
    assert threads_left() == 0


def test_an_error_is_raised_where_its_result_would_have_come():
    def fetch(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    steps = Prefetcher(range(9), fetch)
    assert [next(steps)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(steps)
    assert threads_left() == 0


def test_waiting_is_counted_and_fetching_overlaps_the_loop():
    def fetch(number: int) -> int:
        time.sleep(0.02)
        return number

    with Prefetcher(range(10), fetch) as steps:
        for _ in steps:
            time.sleep(0.03)
    assert 0 < steps.waited_seconds < 0.15  # 0.2 s without overlap


def test_several_threads_keep_the_order():
    def slow_first(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0)
        return number

    assert list(map_ahead(slow_first, range(30), threads=4, ahead=8)) == list(range(30))
