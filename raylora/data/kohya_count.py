"""An epoch's batches and updates as sd-scripts counts them, to compare a job with a run there.

raylora's own count is in `steps.py`: it depends on no number of workers, and an epoch has at most
one short step.
"""

from __future__ import annotations

from collections.abc import Iterable


def batches_per_epoch(showings: Iterable[int], batch_size: int) -> int:
    """Batches that sd-scripts makes of one data set; add them up over several.

    Args:
        showings: images with repeats in each bucket. Each bucket keeps its own short last batch.
        batch_size: images in a batch on one GPU.
    """
    return sum(_cut(images, batch_size) for images in showings)


def updates_per_epoch(batches: int, *, accumulation: int = 1, processes: int = 1) -> int:
    """Optimizer updates of one epoch: each process takes its share of the batches."""
    return _cut(_cut(batches, processes), accumulation)


def steps_for_epochs(
    epochs: int, batches: int, *, accumulation: int = 1, processes: int = 1
) -> int:
    """The `max_train_steps` that sd-scripts sets for `max_train_epochs`."""
    return epochs * updates_per_epoch(batches, accumulation=accumulation, processes=processes)


def _cut(whole: int, size: int) -> int:
    """Parts of at most `size`, the last one perhaps shorter."""
    return -(-whole // size)
