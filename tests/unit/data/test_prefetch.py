"""Work ahead of the loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from raylora.data.prefetch import map_ahead


def threads_left() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_no_more_than_asked_for_is_ahead():
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = map_ahead(lambda number: number, items(), ahead=3)
    for number in results:
        assert len(taken) <= number + 3
        if number == 10:
            break
    results.close()
    assert threads_left() == 0


def test_an_error_is_raised_where_its_result_would_have_come():
    def fetch(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = map_ahead(fetch, range(9))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert threads_left() == 0


def test_several_threads_keep_the_order():
    def slow_first(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0)
        return number

    assert list(map_ahead(slow_first, range(30), threads=4, ahead=8)) == list(range(30))
