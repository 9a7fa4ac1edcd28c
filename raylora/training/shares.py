"""Who computes how many images of a step. This never changes which images they are."""

from __future__ import annotations

from collections.abc import Sequence

HYSTERESIS = 0.1
"""A share moves only when it would by more than this part of an equal share: measured speeds jitter
by a few percent, and every move costs the samples fetched ahead."""

HOPE = 1.1
"""By which a worker without images raises its last known speed, each time shares are fitted."""


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
        self._speed = 0.0

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
        """This worker's images a second over what was noted, and begin anew; 0 is not known yet.

        A worker that had no image since says a little more than it last knew, so that one that was
        slow for a while is given an image some day, and is measured again.
        """
        if self._images:
            self._speed = self._images / self._seconds
        else:
            self._speed *= HOPE
        self._images, self._seconds = 0, 0.0
        return self._speed

    def refit(self, images_per_second: Sequence[float]) -> bool:
        """Follow measured speeds (0 where none is known); True when the shares moved."""
        fastest = max(images_per_second)
        if self.pinned or fastest <= 0:
            return False
        # One that never had an image is taken for the fastest: then it gets one soon.
        speeds = [speed or fastest for speed in images_per_second]
        total = sum(speeds)
        wanted = [speed / total for speed in speeds]
        step = HYSTERESIS / len(wanted)
        if all(abs(w - old) <= step for w, old in zip(wanted, self.weights, strict=True)):
            return False
        self.weights = wanted
        return True
