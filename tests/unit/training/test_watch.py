"""Overfitting is noticed where both curves part, and said once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raylora.training.watch import IN_A_ROW, Overfitting, OverfitWatch

GOOD = (1.0, 1.0)
PARTED = (1.05, 0.9)


def numbers(held_out: float, training: float, **bands: tuple[float, float]) -> dict[str, float]:
    found = {"validation": held_out, "training": training}
    for word, (up, down) in bands.items():
        found[f"validation/{word[1:]}"], found[f"training/{word[1:]}"] = up, down
    return found


def watch(pairs: list[tuple[float, float]]) -> list[int]:
    """Measurements, from 0, after which something was said."""
    watching = OverfitWatch()
    return [i for i, pair in enumerate(pairs) if watching.take(i, numbers(*pair))]


def test_curves_that_part_are_told_of_once():
    assert watch([(1.2, 1.2), GOOD, *[PARTED] * 8]) == [1 + IN_A_ROW]


@pytest.mark.parametrize(
    "pair",
    [(1.05, 1.01), (1.019, 0.5), (0.99, 0.5), (1.0, 1.0)],
    ids=["both rise", "within the margin", "both fall", "nothing moves"],
)
def test_curves_that_do_not_part_are_not(pair: tuple[float, float]):
    assert watch([GOOD, *[pair] * 9]) == []


def test_one_spike_is_not_enough():
    assert watch([GOOD, PARTED, PARTED, GOOD, PARTED, PARTED, GOOD]) == []


def test_after_a_new_best_it_may_be_said_again():
    better = (0.9, 0.8)
    parted_again = (0.95, 0.7)
    said = watch([GOOD, *[PARTED] * 5, better, *[parted_again] * 5])
    assert said == [IN_A_ROW, 6 + IN_A_ROW]


def test_without_images_trained_on_nothing_is_said():
    watching = OverfitWatch()
    assert not any(watching.take(i, {"validation": 1.0 + i}) for i in range(9))


def parted_by_bands() -> Overfitting:
    watching = OverfitWatch()
    watching.take(50, numbers(1.0, 1.0, t150=(0.5, 0.5), t400=(1.0, 1.0), t900=(1.5, 1.5)))
    now = numbers(1.1, 0.9, t150=(0.6, 0.4), t400=(1.3, 0.8), t900=(1.5, 1.4))
    told = [watching.take(step, now) for step in (100, 150, 200)]
    assert told[:2] == [None, None]
    assert told[2] is not None
    return told[2]


def test_it_names_the_bands_that_part_most_first():
    assert parted_by_bands().timesteps == (400, 150)


def test_the_sentence_says_what_was_seen_and_what_to_do():
    facts = parted_by_bands().facts()
    said = facts.pop("warning")
    assert facts == {
        "step": 200,
        "best_step": 50,
        "held_out": [1.0, 1.1],
        "training": [1.0, 0.9],
        "timesteps": [400, 150],
    }
    for words in (
        "overfitting at step 200",
        "rose from 1.0000 (step 50) to 1.1000",
        "fell from 1.0000 to 0.9000",
        "most at timesteps 400 and 150",
        "Step 50 is the one to use",
        "training.keep_best",
    ):
        assert words in said


def test_where_only_the_means_part_the_band_that_rose_most_is_named():
    watching = OverfitWatch()
    watching.take(0, numbers(1.0, 1.0, t1=(1.0, 1.0), t2=(1.0, 1.0)))
    now = numbers(1.05, 0.95, t1=(1.0, 0.8), t2=(1.1, 1.1))
    told = [watching.take(step, now) for step in range(IN_A_ROW)][-1]
    assert told is not None
    assert told.timesteps == (2,)


@pytest.mark.parametrize("cut", range(12))
def test_one_that_is_given_its_facts_back_says_what_the_unbroken_one_does(cut: int):
    pairs = [GOOD, *[PARTED] * 5, (0.9, 0.8), *[(0.95, 0.7)] * 5]
    whole, resumed = OverfitWatch(), OverfitWatch()
    said: list[Any] = [whole.take(i, numbers(*pair)) for i, pair in enumerate(pairs)]
    broken = OverfitWatch()
    for i, pair in enumerate(pairs[:cut]):
        broken.take(i, numbers(*pair))
    resumed.restore(json.loads(json.dumps(broken.facts())))
    later = [resumed.take(i, numbers(*pair)) for i, pair in enumerate(pairs) if i >= cut]
    assert later == said[cut:]
    assert resumed.facts() == whole.facts()
