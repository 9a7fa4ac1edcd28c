"""Noticing that a run overfits: held-out images get worse while those trained on get better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MARGIN = 0.02
"""By which part of its lowest the held-out loss must have risen. The ruler is the same each time,
so what moves it is training alone; over neighbouring steps that is below a percent."""
IN_A_ROW = 3
"""Measurements that must all show it: one may be a spike of the rate."""


@dataclass(frozen=True)
class Overfitting:
    """What was seen, at the measurement that made it sure.

    Attributes:
        step: of this measurement.
        best_step: of the lowest held-out loss.
        held_out, training: (at best_step, now).
        timesteps: whose bands part, most first: held-out up by the margin, training down.
    """

    step: int
    best_step: int
    held_out: tuple[float, float]
    training: tuple[float, float]
    timesteps: tuple[int, ...]

    def facts(self) -> dict[str, Any]:
        """For the event, with one sentence for people."""
        at = " and ".join(str(t) for t in self.timesteps[:3])
        return {
            "step": self.step,
            "best_step": self.best_step,
            "held_out": list(self.held_out),
            "training": list(self.training),
            "timesteps": list(self.timesteps),
            "warning": (
                f"overfitting at step {self.step}: the held-out loss rose from "
                f"{self.held_out[0]:.4f} (step {self.best_step}) to {self.held_out[1]:.4f}, while "
                f"that of images trained on fell from {self.training[0]:.4f} to "
                f"{self.training[1]:.4f}; most at timesteps {at}. Step {self.best_step} is the "
                "one to use (training.keep_best keeps it); to get further, add images, or lower "
                "network.rank or optimizer.learning_rate."
            ),
        }


class OverfitWatch:
    """Told every measurement, says once when the two curves part; again only after a new best."""

    def __init__(self) -> None:
        self._best: dict[str, float] = {}
        self._best_step = 0
        self._in_a_row = 0
        self._said = False

    def take(self, step: int, numbers: Mapping[str, float]) -> Overfitting | None:
        """Look at `validation`, `training` and their bands; None while nothing is to be said."""
        if "training" not in numbers:
            return None
        if not self._best or numbers["validation"] < self._best["validation"]:
            self._best, self._best_step = dict(numbers), step
            self._in_a_row, self._said = 0, False
            return None
        self._in_a_row = self._in_a_row + 1 if self._part(numbers, "") else 0
        if self._said or self._in_a_row < IN_A_ROW:
            return None
        self._said = True
        return Overfitting(
            step=step,
            best_step=self._best_step,
            held_out=(self._best["validation"], numbers["validation"]),
            training=(self._best["training"], numbers["training"]),
            timesteps=self._bands(numbers),
        )

    def facts(self) -> dict[str, Any]:
        """What `restore` needs, as JSON holds it."""
        return {
            "best": self._best,
            "best_step": self._best_step,
            "in_a_row": self._in_a_row,
            "said": self._said,
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Know what was known when these facts were taken."""
        self._best, self._best_step = dict(facts["best"]), int(facts["best_step"])
        self._in_a_row, self._said = int(facts["in_a_row"]), bool(facts["said"])

    def _part(self, numbers: Mapping[str, float], band: str) -> bool:
        return (
            self._rise(numbers, band) > MARGIN
            and numbers[f"training{band}"] < self._best[f"training{band}"]
        )

    def _rise(self, numbers: Mapping[str, float], band: str) -> float:
        name = f"validation{band}"
        return numbers[name] / self._best[name] - 1

    def _bands(self, numbers: Mapping[str, float]) -> tuple[int, ...]:
        """Timesteps whose bands part; where only the means do, the one that rose most."""
        bands = [name.removeprefix("validation") for name in numbers if "validation/" in name]
        bands.sort(key=lambda band: -self._rise(numbers, band))
        parted = [band for band in bands if self._part(numbers, band)]
        return tuple(int(band[1:]) for band in parted or bands[:1])
