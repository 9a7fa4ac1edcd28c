"""Two steps' gradients before the first step: what was predicted is compared with what is.

Nothing moves: no gradient is kept, nothing drawn belongs to a step, and every run is the same with
a trial and without.
"""

from __future__ import annotations

import time
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from raylora.base.log import get_logger
from raylora.base.units import gib
from raylora.data.rows import Rows
from raylora.data.steps import SampleRef
from raylora.memory.ladder import next_down, next_up
from raylora.memory.plan import CardPlan
from raylora.memory.setting import Setting
from raylora.optim.state import state_tensors
from raylora.training.fitting import described, free_unused
from raylora.training.known import KnownSettings, Observed
from raylora.training.loader import micro_batches
from raylora.training.memory import DeviceMemory
from raylora.training.parts import Parts
from raylora.training.step import accumulate_batch

log = get_logger("memory")

Batch = tuple[list[int], dict[str, Tensor]]
MOST_TRIES = 3
"""Settings that are tried beyond the planned one, each for two steps."""


class Trial:
    """Finds the setting that a worker trains with, from what was planned or known before.

    Args:
        memory: of the device.
        states_bytes: of the optimizer, where they lie on the device; before the first step they
            are not there yet.
        known: where the setting is kept for the next run.
    """

    def __init__(
        self, plan: CardPlan, memory: DeviceMemory, *, states_bytes: int, known: KnownSettings
    ) -> None:
        self._plan = plan
        self._memory = memory
        self._states_bytes = states_bytes
        self._known = known

    def settle(self, parts: Parts) -> None:
        """Try the present setting; take a slower one where it does not fit, and a faster one where
        that does by what was seen; keep what it comes to.

        Raises:
            MemoryPlanError: nothing fits.
        """
        fitting = parts.fitting
        planned = fitting.setting
        observed = first = self._observe_fitting(parts)
        predicted = self._predicted(fitting.setting)
        for _ in range(MOST_TRIES):
            above = next_up(self._plan, fitting.setting, observed.peak_bytes)
            found = None if above is None else self._try_faster(parts, above, observed)
            if found is None:
                break
            observed = found
        self._known.keep(fitting.setting, observed)
        fitting.tell(
            "plan",
            card=self._plan.card.name,
            budget_bytes=self._plan.budget_bytes,
            planned=planned.plain(),
            predicted_peak_bytes=predicted,
            observed_peak_bytes=first.peak_bytes,
            setting=fitting.setting.plain(),
            peak_bytes=observed.peak_bytes,
            seconds_per_image=round(observed.seconds_per_image, 4),
        )
        predicted = self._predicted(fitting.setting)
        log.info(
            "%s: %s; peak %s (predicted %s) of %s, %.2f s an image",
            *(self._plan.card.name, described(fitting.setting), gib(observed.peak_bytes)),
            *(gib(predicted) if predicted else "not", gib(self._plan.budget_bytes)),
            observed.seconds_per_image,
        )

    def _predicted(self, setting: Setting) -> int | None:
        """The plan's peak of training in a setting; None where it has no such setting."""
        known = self._plan.known(setting)
        return known.peaks["train"] if known else None

    def _observe_fitting(self, parts: Parts) -> Observed:
        """With what is left of the plan, from the present setting down until one fits."""
        fitting = parts.fitting
        while True:
            observed = fitting.again(lambda: self.observe(parts), "a trial of the largest images")
            if observed.peak_bytes <= self._plan.budget_bytes:
                return observed
            below = next_down(fitting.setting, fitting.options, self._plan)
            if below is None:
                return observed  # it went through: the reserve is what it took
            try:
                fitting.apply(below)
            except torch.OutOfMemoryError:
                fitting.again(lambda: fitting.apply(fitting.setting), "placing the models")

    def _try_faster(self, parts: Parts, above: Setting, before: Observed) -> Observed | None:
        """What a faster setting shows; None, and back, where it is none or does not fit."""
        fitting, setting = parts.fitting, parts.fitting.setting
        try:
            fitting.apply(above)
            found = self.observe(parts)
        except torch.OutOfMemoryError:
            found = None
        if (
            found is not None
            and found.peak_bytes <= self._plan.budget_bytes
            and found.seconds_per_image < before.seconds_per_image
        ):
            return found
        free_unused()
        fitting.apply(setting)
        return None

    def observe(self, parts: Parts, given: Batch | None = None) -> Observed:
        """Take the gradients of two steps at the largest bucket, and leave everything as it was.

        Args:
            given: sample numbers and a batch of that bucket; None takes real images.

        Raises:
            OutOfMemoryError: it does not fit.
        """
        numbers, batch = largest_batch(parts) if given is None else given
        self._memory.forget_peak()
        seconds = 0.0
        try:
            for _ in range(2):  # the first also makes what is made once
                began = time.perf_counter()
                parts.sums.begin()
                accumulate_batch(parts, 0, numbers, batch)
                if parts.device.type == "cuda":
                    torch.cuda.synchronize(parts.device)
                seconds = time.perf_counter() - began
        finally:
            parts.sums.begin()
        missing = 0
        if not parts.fitting.setting.host_states:
            missing = max(0, self._states_bytes - _held_states(parts))
        return Observed(self._memory.peak_bytes + missing, seconds / len(numbers))


def largest_batch(parts: Parts) -> tuple[list[int], dict[str, Tensor]]:
    """A micro-batch of real images of the largest bucket, some of them twice where it has few."""
    rows = parts.loader.dataset.rows
    chosen = islice(cycle(_largest_rows(rows, parts.micro_batch)), parts.micro_batch)
    samples = [
        SampleRef(row=at, repeat=0, number=row.number, bucket=row.bucket)
        for at, row in ((at, rows[at]) for at in chosen)
    ]
    tensors = parts.loader.fetch(samples)
    ((mates, batch),) = micro_batches(samples, tensors, len(samples))
    return [sample.number for sample in mates], batch


def _largest_rows(rows: Rows, most: int) -> list[int]:
    areas = rows.bucket[:, 0].astype(np.int64) * rows.bucket[:, 1]
    first = int(areas.argmax())
    same = (rows.bucket == rows.bucket[first]).all(axis=1)
    return [int(at) for at in np.flatnonzero(same)[:most]]


def _held_states(parts: Parts) -> int:
    """Bytes of the optimizer's states that are on the device already."""
    held = state_tensors(parts.mover.optimizer)
    return sum(one.nbytes for one in held if one.device.type == parts.device.type)
