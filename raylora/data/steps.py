"""Which images each global step shows, fixed before anyone asks how many workers there are.

An epoch shows each image exactly `repeats` times. Within a bucket the showings are permuted and cut
into full steps; what is left of all buckets is pooled, in the order of the buckets, and cut into
steps too, so some steps mix buckets (mates side by side) and the last of these may be short. Then
the steps are permuted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raylora.base.errors import DataError
from raylora.base.seeds import draw_generator, sample_number
from raylora.data.pixels.bucket import Size
from raylora.data.rows import Rows

# In a bucket's place, for the order of an epoch's steps; no data set has so many buckets.
_STEPS = 2**32


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One showing of one row in one step."""

    row: int
    """Index into the rows the plan was made of."""
    repeat: int
    """Which of the row's showings this is, from 0."""
    number: int
    """Names its randomness (`base.seeds.sample_number`)."""
    bucket: Size


class StepPlan:
    """The showings of every step of every epoch, a pure function of rows, size and seed.

    Knows no workers. A million rows take a second or less at the start of an epoch, and nothing
    later; any step may be asked for at any time.

    Args:
        rows: the data set's rows; their order matters.
        images_per_step: images in a global step, over all workers.
        order_seed: `data.order_seed`.
    """

    def __init__(self, rows: Rows, images_per_step: int, order_seed: int) -> None:
        if not len(rows):
            raise DataError(
                "There are no images to train on: what data names is held out "
                "(data.validation_split) or bad (quarantine.jsonl says why). Give more images, or "
                "hold out fewer."
            )
        self._rows, self._size, self._seed = rows, images_per_step, order_seed
        self._buckets = _showings_by_bucket(rows)
        self.samples_per_epoch = sum(len(showings) for showings in self._buckets)
        self.steps_per_epoch = -(-self.samples_per_epoch // images_per_step)
        # Two, since a prefetcher is an epoch ahead for a moment.
        self._epochs: dict[int, _Epoch] = {}

    def samples(self, step: int) -> list[SampleRef]:
        """The showings of global step `step`, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return [self._reference(row, repeat) for row, repeat in self._epoch(epoch).step(within)]

    def _reference(self, row: int, repeat: int) -> SampleRef:
        rows = self._rows
        width, height = rows.bucket[row].tolist()
        number = sample_number(rows.keys[row].as_py(), repeat, int(rows.set[row]))
        return SampleRef(row, repeat, number, (width, height))

    def _epoch(self, number: int) -> _Epoch:
        found = self._epochs.get(number)
        if found is None:
            found = _Epoch(self._buckets, self._size, self._seed, number)
            kept = dict(list(self._epochs.items())[-1:])
            self._epochs = {**kept, number: found}
        return found


class _Epoch:
    """The order of one epoch: showings in one array, steps as slices of it."""

    def __init__(
        self, buckets: list[NDArray[np.int32]], size: int, order_seed: int, epoch: int
    ) -> None:
        full, left = [], []
        for number, showings in enumerate(buckets):
            mixed = showings[_permutation(len(showings), order_seed, epoch, number)]
            cut = len(mixed) // size * size
            full.append(mixed[:cut])
            left.append(mixed[cut:])
        self._showings = np.concatenate(full + left)
        self._size = size
        steps = -(-len(self._showings) // size)
        self._order = _permutation(steps, order_seed, epoch, _STEPS)

    def step(self, number: int) -> list[tuple[int, int]]:
        start = int(self._order[number]) * self._size
        return [
            (row, repeat) for row, repeat in self._showings[start : start + self._size].tolist()
        ]


def _showings_by_bucket(rows: Rows) -> list[NDArray[np.int32]]:
    """For each bucket, in the order of its size: an (N, 2) array of row and repeat."""
    repeats = rows.repeats.astype(np.int64)
    # As one number: numpy finds distinct numbers several times faster than distinct pairs.
    sizes = rows.bucket[:, 0].astype(np.int64) * _STEPS + rows.bucket[:, 1]
    _, bucket = np.unique(sizes, return_inverse=True)
    row = np.repeat(np.arange(len(rows), dtype=np.int32), repeats)
    first = np.repeat(np.cumsum(repeats) - repeats, repeats)
    showings = np.stack([row, (np.arange(len(row)) - first).astype(np.int32)], axis=1)
    by_bucket = np.argsort(bucket[row], kind="stable")
    ends = np.cumsum(np.bincount(bucket[row]))
    return np.split(showings[by_bucket], ends[:-1])


def _permutation(count: int, order_seed: int, epoch: int, number: int) -> NDArray[np.intp]:
    # Sorting raw bits, since numpy promises these for ever and its own permutation not.
    bits = draw_generator(order_seed, epoch, number, "order").bit_generator.random_raw(count)
    return np.argsort(bits, kind="stable")
