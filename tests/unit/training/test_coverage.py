"""An epoch over any fleet: each showing is trained exactly once, in batches of one bucket."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from small import image_row

from raylora.data.rows import rows_of
from raylora.data.steps import StepPlan
from raylora.training.loader import micro_batches
from raylora.training.shares import Shares

BUCKETS = [(48, 80), (64, 64), (80, 48)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from(BUCKETS)), min_size=1, max_size=25),
    st.integers(1, 12),
    st.lists(st.floats(0.05, 20), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_workers_and_micro_batches_cover_an_epoch_exactly(
    images: list[tuple[int, tuple[int, int]]],
    images_per_step: int,
    weights: list[float],
    most: int,
    epoch: int,
):
    rows = rows_of(
        [
            image_row(f"{number}.png", repeats=repeats, bucket=bucket)
            for number, (repeats, bucket) in enumerate(images)
        ]
    )
    plan = StepPlan(rows, images_per_step, 3)
    shares = Shares(len(weights), tuple(weights))
    trained: Counter[tuple[int, int]] = Counter()
    numbers = set()
    for step in range(plan.steps_per_epoch):
        samples = plan.samples(epoch * plan.steps_per_epoch + step)
        for rank in range(len(weights)):
            mine = samples[shares.mine(rank, len(samples))]
            tensors = [{"latents": np.array([sample.row])} for sample in mine]
            for mates, batch in micro_batches(mine, tensors, most):
                assert 1 <= len(mates) <= most
                assert len({rows[mate.row].bucket for mate in mates}) == 1
                assert batch["latents"][:, 0].tolist() == [mate.row for mate in mates]
                trained.update((mate.row, mate.repeat) for mate in mates)
                numbers |= {mate.number for mate in mates}
    assert trained == {(i, r): 1 for i, (n, _) in enumerate(images) for r in range(n)}
    assert len(numbers) == len(trained)
