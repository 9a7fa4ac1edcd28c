"""Loss scaling: down at an overflow, up after long calm, and the same after a resume."""

from __future__ import annotations

from raylora.training.loss_scale import FIRST, GROW_AFTER, LARGEST, LossScale


def test_off_it_is_one_and_blames_nothing():
    scale = LossScale(on=False)
    assert scale.factor == 1.0
    assert not scale.overflowed()
    assert scale.passed() == {}


def test_an_overflow_halves_it_until_it_is_one_which_is_not_to_blame():
    scale, tried = LossScale(on=True), [FIRST]
    while scale.overflowed():
        tried.append(scale.factor)
    assert tried == [2.0**n for n in range(16, -1, -1)]


def test_a_step_that_no_scale_mends_leaves_it_as_it_was():
    scale = LossScale(on=True)
    scale.overflowed()
    scale.passed()
    for _ in range(2):  # skipped, as `training.on_nan` may say
        while scale.overflowed():
            pass
        assert scale.factor == FIRST / 2


def test_it_doubles_after_long_calm_and_an_overflow_starts_the_count_again():
    scale = LossScale(on=True)
    for _ in range(GROW_AFTER - 1):
        assert scale.passed() == {"loss_scale": FIRST}
    scale.overflowed()
    for _ in range(GROW_AFTER - 1):
        scale.passed()
    assert scale.factor == FIRST / 2
    scale.passed()
    assert scale.factor == FIRST


def test_it_has_an_end():
    scale = LossScale(on=True)
    for _ in range(12 * GROW_AFTER):
        scale.passed()
    assert scale.factor == LARGEST


def test_a_resume_goes_on_where_it_was():
    scale = LossScale(on=True)
    scale.overflowed()
    for _ in range(GROW_AFTER - 1):
        scale.passed()
    again = LossScale(on=True)
    again.restore(scale.facts())
    scale.passed()
    again.passed()
    assert again.facts() == scale.facts()
    assert again.factor == FIRST
