"""Who computes how many images of a step. This never changes which images they are."""

from __future__ import annotations

from collections.abc import Sequence

HYSTERESIS = 0.1
"""A share moves only when it would by more than this part of an equal share: measured speeds jitter
by a few percent, and every move costs the samples fetched ahead."""


def split(count: int, weights: Sequence[float]) -> list[int]:
    """`count` images over workers in proportion to weights; whole numbers that add up to count.

    Largest remainders get what rounding leaves, lower ranks first among equals.
    """
    total = sum(weights)
    exact = [count * weight / total for weight in weights]
    whole = [int(part) for part in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: count - sum(whole)]:
        whole[i] += 1
    return whole


class Shares:
    """The present weights of the workers.

    Args:
        size: number of workers.
        pinned: weights by rank that never move; None measures.
    """

    def __init__(self, size: int, pinned: Sequence[float] | None = None) -> None:
        self.pinned = pinned is not None
        self.weights = list(pinned) if pinned is not None else [1.0 / size] * size
        self._images, self._seconds = 0, 0.0

    def mine(self, rank: int, count: int) -> slice:
        """The part of a step's list that this worker computes."""
        counts = split(count, self.weights)
        start = sum(counts[:rank])
        return slice(start, start + counts[rank])

    def note(self, images: int, seconds: float) -> None:
        """Remember what this worker computed, and in how long, since its speed was last taken."""
        self._images += images
        self._seconds += seconds

    def take_speed(self) -> float:
        """This worker's images a second over what was noted, and begin anew; 0 when it had none."""
        speed = self._images / self._seconds if self._seconds > 0 else 0.0
        self._images, self._seconds = 0, 0.0
        return speed

    def refit(self, images_per_second: Sequence[float]) -> bool:
        """Follow measured speeds (0 where none was measured); True when the shares moved."""
        if self.pinned or min(images_per_second) <= 0:
            return False
        total = sum(images_per_second)
        wanted = [speed / total for speed in images_per_second]
        step = HYSTERESIS / len(wanted)
        if all(abs(w - old) <= step for w, old in zip(wanted, self.weights, strict=True)):
            return False
        self.weights = wanted
        return True
