"""A worker's samples of each step, and their tensors, fetched ahead of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from raylora.data.steps import SampleRef, StepPlan
from raylora.data.supply import Supply, Tensors
from raylora.training.shares import Shares

AHEAD = 4
"""Steps fetched ahead: enough to hide one slow object, few enough to drop when shares move."""


class Loader:
    """Names the samples of a step, picks this worker's, and has their tensors at hand.

    Fetching ahead is a guess that shares stay as they are; where they moved, the step fetches what
    is missing itself, so a guess never changes what is trained.
    """

    def __init__(self, supply: Supply, plan: StepPlan, shares: Shares, rank: int) -> None:
        self.dataset = supply.dataset
        self._supply = supply
        self.plan = plan
        self.last_step: int | None = None
        self._shares = shares
        self._rank = rank
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="raylora-fetch")
        self._ahead: dict[int, tuple[list[SampleRef], Future[list[Tensors]]]] = {}

    def mine(self, step: int) -> tuple[list[SampleRef], int]:
        """(this worker's samples of the step, how many the whole step has)."""
        samples = self.plan.samples(step)
        return samples[self._shares.mine(self._rank, len(samples))], len(samples)

    def take(self, step: int) -> tuple[list[SampleRef], list[Tensors], int]:
        """This worker's samples, their tensors, and the step's global count."""
        samples, count = self.mine(step)
        guessed = self._ahead.pop(step, None)
        hit = guessed is not None and guessed[0] == samples
        tensors = guessed[1].result() if guessed and hit else self._supply.fetch(samples, step)
        for old in [key for key in self._ahead if key < step]:
            del self._ahead[old]
        for later in range(step + 1, step + 1 + AHEAD):
            wanted = later not in self._ahead
            if wanted and (self.last_step is None or later < self.last_step):
                ahead, _ = self.mine(later)
                self._ahead[later] = (ahead, self._threads.submit(self._supply.fetch, ahead, later))
        return samples, tensors, count

    def fetch(self, samples: Sequence[SampleRef]) -> list[Tensors]:
        """The tensors of samples of the first step, whoever's they are."""
        return self._supply.fetch(samples, 0)

    def close(self) -> None:
        """Stop fetching."""
        self._threads.shutdown(cancel_futures=True)
        self._supply.close()


def micro_batches(
    samples: Sequence[SampleRef], tensors: Sequence[Tensors], size: int
) -> Iterator[tuple[list[SampleRef], dict[str, Tensor]]]:
    """Cut a worker's samples into batches of one bucket, at most `size` images each.

    Each is copied together when it is asked for: held-out images may be many.
    """
    pairs = zip(samples, tensors, strict=True)
    for _, group in groupby(pairs, key=lambda pair: pair[0].bucket):
        mates = list(group)
        for start in range(0, len(mates), size):
            part = mates[start : start + size]
            stacked = {
                name: torch.from_numpy(np.stack([tensor[name] for _, tensor in part]))
                for name in part[0][1]
            }
            yield [sample for sample, _ in part], stacked


def count_batches(samples: Sequence[SampleRef], size: int) -> int:
    """How many `micro_batches` makes of them."""
    groups = groupby(samples, key=lambda sample: sample.bucket)
    return sum(-(-len(list(group)) // size) for _, group in groups)
