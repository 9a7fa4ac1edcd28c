"""Learning-rate schedules over global steps, so that the curve is the same on any fleet."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from raylora.base.options import Options


class ScheduleOptions(Options):
    """How the rate goes over the run."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant stays, linear and cosine fall to zero at the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Global steps over which the rate climbs from zero."""


def make_schedule(options: ScheduleOptions, total_steps: int) -> Callable[[int], float]:
    """A function from the global step, counted from 0, to the factor on the learning rate.

    Source: notes of sd-scripts' schedulers: factor t / W in warm-up, then by
    p = (t - W) / (T - W): 1, 1 - p or (1 + cos(pi p)) / 2.
    """
    warmup = options.warmup_steps
    shapes: dict[str, Callable[[float], float]] = {
        "constant": lambda p: 1.0,
        "linear": lambda p: 1.0 - p,
        "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
    }
    after = shapes[options.name]

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return after((step - warmup) / max(1, total_steps - warmup))

    return factor
