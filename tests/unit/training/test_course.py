"""When things happen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raylora.training.course import Course, steps_between
from raylora.training.judge import Judge

COURSE = Course(
    total_steps=10,
    save_every=4,
    validate_every=3,
    preview_every=5,
    refit_every=1,
    checksum_every=1,
)


def steps(happens: Any) -> list[int]:
    return [done for done in range(11) if happens(done)]


def test_saving_measuring_and_drawing_each_have_their_pace_and_the_end():
    assert steps(COURSE.saves_at)[1:] == [4, 8, 10]
    assert steps(COURSE.validates_at) == [0, 3, 6, 9, 10]
    assert steps(COURSE.previews_at) == [0, 5, 10]


def test_none_is_only_the_end():
    never = replace(COURSE, save_every=None, validate_every=None, preview_every=None)
    assert steps(never.saves_at) == [10]
    assert steps(never.validates_at) == [0, 10]
    assert steps(never.previews_at) == [0, 10]


def test_the_first_previews_can_be_left_out():
    assert steps(replace(COURSE, preview_first=False).previews_at) == [5, 10]


@pytest.mark.parametrize(
    ("given", "between"), [((7, None), 7), ((None, 3), 36), ((None, None), None)]
)
def test_an_epoch_is_so_many_global_steps(given: Any, between: int | None):
    assert steps_between(*given, steps_per_epoch=12) == between


def test_the_bases_own_loss_is_no_best_and_no_reason_to_stop():
    judge = Judge(replace(COURSE, keep_best=True, patience=1))
    judge.take(0, {"validation": 0.1})
    assert judge.keep == []
    judge.take(3, {"validation": 0.5})
    assert (judge.keep, judge.over, judge.saves_at(3)) == ([3], False, True)
    judge.take(6, {"validation": 0.6})
    assert (judge.keep, judge.over, judge.saves_at(6)) == ([3], True, True)


def test_the_best_is_saved_only_where_it_is_to_be_kept():
    judge = Judge(COURSE)
    judge.take(3, {"validation": 0.5})
    assert judge.best.step == 3
    assert not judge.saves_at(3)
    assert judge.keep == []
