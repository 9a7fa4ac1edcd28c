"""An average over the run of the adapter's values, which is what people get where it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pydantic import Field
from torch import Tensor

from raylora.base.options import Options, known_as


class EmaOptions(Options):
    """An exponential moving average of the weights; held-out loss, previews and files use it."""

    decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        json_schema_extra=known_as(
            formula="average = d average + (1 - d) weights, d = min(decay, (1 + t) / (10 + t)), "
            "t the global steps done",
            source="Polyak & Juditsky 1992; the growing d is TensorFlow's",
            sd_scripts="none",
            guides="EMA",
        ),
    )
    """How much of the average stays at each global step; 0.99 to 0.9999 are usual, and it forgets
    over about 1 / (1 - decay) steps. Null: no average."""
    place: Literal["device", "host"] = "device"
    """Where it is kept; on the host it takes no GPU memory, and the GPU waits for a copy at each
    step."""


class Ema:
    """The average of one flat tensor.

    Args:
        values: (N,) what is averaged; the average starts as its copy.
    """

    def __init__(self, options: EmaOptions, values: Tensor) -> None:
        assert options.decay is not None
        self._decay = options.decay
        self._values = values
        self.average = values.to("cpu" if options.place == "host" else values.device, copy=True)

    def update(self, done: int) -> None:
        """Take in the values after `done` global steps, from 1."""
        decay = min(self._decay, (1 + done) / (10 + done))
        self.average.lerp_(self._values.to(self.average.device), 1.0 - decay)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within it, the values are the average."""
        held = self._values.to(self.average.device, copy=True)
        self._values.copy_(self.average)
        try:
            yield
        finally:
            self._values.copy_(held)
