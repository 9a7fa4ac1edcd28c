"""The global steps: every showing once an epoch, whatever the sizes."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.base.errors import DataError
from raylora.base.seeds import sample_number
from raylora.data.rows import Row, rows_of
from raylora.data.steps import StepPlan

SIZES = [(512, 512), (448, 576), (576, 448)]


def row(number: int, repeats: int = 1, bucket: int = 0) -> Row:
    key = f"{number:07d}.png"
    size, keys = SIZES[bucket], (b"l" * 16,)
    return Row(key, repeats, size, "", size, latents_keys=keys, text_keys=keys, crops=((0, 0),))


def plan_of(rows: list[Row], images_per_step: int, order_seed: int) -> StepPlan:
    return StepPlan(rows_of(rows), images_per_step, order_seed)


def epoch_of(plan: StepPlan, epoch: int) -> list[list[tuple[int, int]]]:
    first = epoch * plan.steps_per_epoch
    steps = [plan.samples(first + step) for step in range(plan.steps_per_epoch)]
    return [[(sample.row, sample.repeat) for sample in step] for step in steps]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=30),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_an_epoch_shows_each_image_exactly_repeats_times(
    images: list[tuple[int, int]], images_per_step: int, epoch: int
):
    rows = [row(number, *image) for number, image in enumerate(images)]
    plan = plan_of(rows, images_per_step, 5)
    steps = epoch_of(plan, epoch)
    shown = Counter(showing for step in steps for showing in step)
    assert shown == {(i, r): 1 for i, one in enumerate(rows) for r in range(one.repeats)}
    assert sorted(map(len, steps))[1:] == [images_per_step] * (len(steps) - 1)
    mixed = [step for step in steps if len({rows[i].bucket for i, _ in step}) > 1]
    assert len(mixed) <= len(SIZES)
    for step in mixed:  # mates of a bucket lie side by side
        buckets = [rows[i].bucket for i, _ in step]
        assert buckets == sorted(buckets)


def test_a_showing_knows_its_bucket_and_its_number():
    rows = [row(0, repeats=2), row(1, bucket=1)]
    samples = [sample for step in range(2) for sample in plan_of(rows, 2, 0).samples(step)]
    for sample in samples:
        assert sample.bucket == rows[sample.row].bucket
        assert sample.number == sample_number(rows[sample.row].key, sample.repeat)
    assert len({sample.number for sample in samples}) == 3


def test_any_step_may_be_asked_for_in_any_order():
    rows = [row(number, repeats=2, bucket=number % 3) for number in range(50)]
    plan = plan_of(rows, 8, 1)
    forward = [plan.samples(step) for step in range(60)]
    fresh = plan_of(rows, 8, 1)
    assert [fresh.samples(step) for step in reversed(range(60))] == forward[::-1]


def test_epochs_and_seeds_have_orders_of_their_own():
    rows = [row(number) for number in range(64)]
    plan = plan_of(rows, 8, 1)
    assert epoch_of(plan, 0) != epoch_of(plan, 1)
    assert epoch_of(plan, 0) != epoch_of(plan_of(rows, 8, 2), 0)


def test_the_order_is_the_same_on_every_machine():
    rows = [row(number, repeats=1 + number % 3, bucket=number % 3) for number in range(100)]
    order = repr([epoch_of(plan_of(rows, 7, 42), epoch) for epoch in range(3)])
    assert hashlib.sha256(order.encode()).hexdigest()[:16] == "d1d5abce406a920a"


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="no images to train on"):
        plan_of([], 4, 0)


def test_a_hundred_thousand_rows_are_planned_in_a_moment():
    one = row(0)
    rows = rows_of(
        [replace(one, key=str(n), repeats=2, bucket=SIZES[n % 3]) for n in range(100_000)]
    )
    began = time.process_time()
    plan = StepPlan(rows, 64, 0)
    plan.samples(0)
    planned = time.process_time()
    for step in range(1, 200):
        plan.samples(step)
    assert planned - began < 2  # some 0.2 s; slow machines have their share
    assert time.process_time() - planned < 1
