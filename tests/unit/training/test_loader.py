"""A worker's samples of a step, fetched ahead, and cut into batches of one bucket."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import image_row

from raylora.data.rows import rows_of
from raylora.data.steps import SampleRef, StepPlan
from raylora.training.loader import AHEAD, Loader, micro_batches
from raylora.training.shares import Shares

BUCKETS = [(48, 80), (64, 64), (80, 48)]


class Images:
    """In a supply's place: fetches count, and can be held up or made to fail."""

    def __init__(self, count: int) -> None:
        self.dataset = None
        self.rows = rows_of([image_row(f"{i}.png") for i in range(count)])
        self.fetched: list[list[str]] = []
        self.fails = False
        self.threads: set[str] = set()

    def close(self) -> None: ...

    def fetch(self, samples: Sequence[SampleRef], step: int) -> list[dict[str, Any]]:
        self.fetched.append([self.rows[sample.row].key for sample in samples])
        self.threads.add(threading.current_thread().name)
        if self.fails:
            raise OSError("the store is gone")
        return [{"latents": np.array([sample.row])} for sample in samples]


def loader(images: Images, shares: Shares | None = None, rank: int = 0) -> Loader:
    plan = StepPlan(images.rows, 4, order_seed=0)
    return Loader(images, plan, shares or Shares(1), rank)  # type: ignore[arg-type]


def numbers(taken: tuple[list[SampleRef], list[Any], int]) -> tuple[list[int], list[int]]:
    samples, tensors, _ = taken
    return [s.row for s in samples], [int(t["latents"][0]) for t in tensors]


def test_tensors_belong_to_their_samples_whatever_was_fetched_ahead():
    here = loader(Images(20))
    for step in (0, 1, 2, 7, 3, 3, 12):
        rows, values = numbers(here.take(step))
        assert rows == values == [s.row for s in here.plan.samples(step)]
    here.close()


def test_the_next_steps_are_fetched_on_another_thread_and_not_twice():
    images = Images(40)
    here = loader(images)
    for step in range(6):
        here.take(step)
    here.close()
    fetched = [tuple(keys) for keys in images.fetched]
    assert len(set(fetched)) == len(fetched)
    assert len(images.threads) == 2
    assert 6 <= len(fetched) <= 6 + AHEAD


def test_nothing_past_the_end_is_fetched():
    images = Images(40)
    here = loader(images)
    here.last_step = 3
    for step in range(3):
        here.take(step)
    here.close()
    assert len(images.fetched) == 3


def test_moved_shares_make_a_guess_useless_but_not_wrong():
    shares = Shares(2)
    here = loader(Images(40), shares, rank=1)
    first, count = here.mine(0)
    assert (len(first), count) == (2, 4)
    here.take(0)
    shares.weights = [0.25, 0.75]
    for step in (1, 2):
        rows, values = numbers(here.take(step))
        assert rows == values == [s.row for s in here.plan.samples(step)[1:]]
    here.close()


def test_a_worker_without_images_gets_an_empty_step():
    here = loader(Images(8), Shares(2, pinned=[1.0, 0.0]), rank=1)
    assert here.take(0) == ([], [], 4)
    here.close()


def test_an_error_ahead_is_raised_at_its_own_step():
    images = Images(40)
    here = loader(images)
    here.take(0)
    here._threads.submit(lambda: None).result()  # all guesses are in
    images.fails = True
    for step in range(1, 1 + AHEAD):
        here.take(step)
    with pytest.raises(OSError, match="the store is gone"):
        here.take(1 + AHEAD)
    here.close()


drawn_samples = st.lists(st.sampled_from(BUCKETS), max_size=20).map(
    lambda buckets: [SampleRef(i, 0, i, bucket) for i, bucket in enumerate(sorted(buckets))]
)


@given(samples=drawn_samples, size=st.integers(1, 8))
def test_batches_hold_every_sample_once_in_order_of_one_bucket(samples: Any, size: int):
    tensors = [
        {"latents": np.full((1, s.bucket[1] // 16, s.bucket[0] // 16), s.row)} for s in samples
    ]
    batches = list(micro_batches(samples, tensors, size))
    assert [mate for mates, _ in batches for mate in mates] == samples
    for mates, batch in batches:
        assert 1 <= len(mates) <= size
        assert len({mate.bucket for mate in mates}) == 1
        assert batch["latents"][:, 0, 0, 0].tolist() == [mate.row for mate in mates]


def test_no_batch_is_smaller_than_it_must_be():
    samples = [SampleRef(i, 0, i, BUCKETS[i // 5]) for i in range(10)]
    tensors = [{"text": np.zeros((2, 3), np.float32)}] * 10
    batches = list(micro_batches(samples, tensors, 4))
    assert [len(mates) for mates, _ in batches] == [4, 1, 4, 1]
    assert batches[0][1]["text"].shape == (4, 2, 3)
    assert batches[0][1]["text"].dtype == torch.float32
