"""The best held-out loss of a run, and whether it is worth going on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Best:
    """The lowest held-out loss so far, and how many measurements ago something got better.

    A pure function of the measurements it is told, so every worker knows the same, and so does a
    resumed run that is given the facts back.

    Args:
        patience: measurements without an improvement after which it is over; None is never.
        min_delta: an improvement is at least this part below the last one.
    """

    def __init__(self, patience: int | None = None, min_delta: float = 0.0) -> None:
        self._patience, self._min_delta = patience, min_delta
        self.step: int | None = None
        self.loss = math.inf
        self._improved = math.inf
        self._waited = 0

    def take(self, step: int, loss: float) -> bool:
        """Whether this measurement is the best so far. NaN never is."""
        if loss < self._improved * (1 - self._min_delta):
            self._improved, self._waited = loss, 0
        else:
            self._waited += 1
        if not loss < self.loss:
            return False
        self.step, self.loss = step, loss
        return True

    @property
    def over(self) -> bool:
        """Whether nothing has got better for too long."""
        return self._patience is not None and self._waited >= self._patience

    @property
    def waited(self) -> int:
        """Measurements since the last improvement."""
        return self._waited

    def facts(self) -> dict[str, Any]:
        """What `restore` needs, as JSON holds it."""
        known = self.step is not None
        return {
            "step": self.step,
            "loss": self.loss if known else None,
            "improved": self._improved if known else None,
            "waited": self._waited,
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Know what was known when these facts were taken."""
        self._waited = int(facts["waited"])
        if facts["step"] is not None:
            self.step, self.loss = int(facts["step"]), float(facts["loss"])
            self._improved = float(facts["improved"])
