"""The best measurement, and when to stop waiting for a better one."""

from __future__ import annotations

import json
import math

import pytest

from raylora.training.best import Best


def told(best: Best, losses: list[float]) -> list[int]:
    """Which of the measurements, from 1, were the best so far."""
    return [step for step, loss in enumerate(losses, start=1) if best.take(step, loss)]


def test_the_lowest_is_the_best_and_of_equals_the_first():
    best = Best()
    assert told(best, [3.0, 2.0, 2.0, 2.5, 1.0, 1.0]) == [1, 2, 5]
    assert (best.step, best.loss) == (5, 1.0)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_it_is_over_after_so_many_measurements_without_a_new_low(patience: int):
    best = Best(patience)
    over = []
    for step, loss in enumerate([2.0, 1.0, 1.5, 1.4, 1.3, 1.2], start=1):
        best.take(step, loss)
        over.append(best.over)
    assert over.index(True) == 1 + patience


def test_a_new_low_begins_the_waiting_anew():
    best = Best(2)
    told(best, [2.0, 2.1, 1.9, 2.0])
    assert not best.over
    told(best, [2.0])
    assert best.over


def test_small_steps_down_are_best_but_no_improvement():
    """One percent is asked for: 1.00, then 0.995 and 0.992 wait; 0.989 is 1.1 % below 1.00."""
    best = Best(3, 0.01)
    assert told(best, [1.0, 0.995, 0.992]) == [1, 2, 3]
    assert best.waited == 2
    assert told(best, [0.989]) == [1]
    assert best.waited == 0
    told(best, [0.988, 0.987, 0.986])
    assert best.over


def test_without_patience_it_is_never_over():
    best = Best()
    told(best, [1.0] * 1000)
    assert not best.over


def test_nan_is_never_best_and_is_waited_through():
    best = Best(2)
    assert told(best, [math.nan, 1.0, math.nan]) == [2]
    assert best.waited == 1
    best.take(4, math.nan)
    assert best.over


@pytest.mark.parametrize("cut", range(7))
def test_one_that_is_given_its_facts_back_judges_as_the_unbroken_one(cut: int):
    losses = [math.nan, 0.3, 0.1 + 0.2, 0.31, 0.2999, 0.31, 0.4]
    whole, broken, resumed = (Best(3, 0.01) for _ in range(3))
    told(broken, losses[:cut])
    resumed.restore(json.loads(json.dumps(broken.facts())))
    for step, loss in enumerate(losses, start=1):
        was = whole.take(step, loss)
        if step > cut:
            assert resumed.take(step, loss) == was
    assert resumed.facts() == whole.facts()
    assert resumed.over == whole.over
