"""What each measurement means for the run: the best so far, over, overfitting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raylora.training.best import Best
from raylora.training.course import Course
from raylora.training.watch import Overfitting, OverfitWatch


class Judge:
    """Judges measurements; the same on every worker, since their numbers are.

    What was measured before the first step is the base's and counts for nothing: a run that begins
    by getting worse, as one with a warm-up may, is still looked at for its own best.
    """

    def __init__(self, course: Course) -> None:
        self.best = Best(course.patience, course.min_delta)
        self._keeps = course.keep_best
        self._watch = OverfitWatch()

    @property
    def over(self) -> bool:
        """Whether the run is to end here."""
        return self.best.over

    def take(self, done: int, numbers: Mapping[str, float]) -> Overfitting | None:
        """Take a measurement after `done` steps; what is to be warned about, if anything."""
        if done == 0:
            return None
        self.best.take(done, numbers["validation"])
        return self._watch.take(done, numbers)

    def saves_at(self, done: int) -> bool:
        """Whether the measurement after these steps is to be kept, or is the last."""
        return self.over or done in self.keep

    @property
    def keep(self) -> list[int]:
        """Steps whose checkpoints pruning spares."""
        return [self.best.step] if self._keeps and self.best.step is not None else []

    def facts(self) -> dict[str, Any]:
        """For the checkpoint, so that a resumed run judges as the unbroken one."""
        return {"best": self.best.facts(), "watch": self._watch.facts()}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's facts."""
        self.best.restore(facts["best"])
        self._watch.restore(facts["watch"])
