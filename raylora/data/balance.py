"""How often regularisation images are shown, so that they balance the images they stand against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def balanced_repeats(repeats: NDArray[np.int64], target: int) -> NDArray[np.int64]:
    """The showings of a group's regularisation images, together as many as those of its others.

    Images are taken in order, each with its repeats, until `target` is reached; those after it are
    not shown, and the last one taken may overshoot by its repeats less one. When all are taken and
    it is not reached, each gets one showing more, in order and round after round, up to `target`.

    Args:
        repeats: (N,) at least 1 each, in the order in which the images stand in their sets.
        target: showings of the group's other images in an epoch.

    Returns:
        (N,) showings in an epoch; 0 for an image that is left out.

    Source: `DreamBoothDataset` in sd-scripts' library/train_util.py.
    """
    count = len(repeats)
    if count == 0:
        return repeats.copy()
    before = np.cumsum(repeats) - repeats
    missing = target - int(repeats.sum())
    if missing <= 0:
        return np.where(before < target, repeats, 0)
    rounds, rest = divmod(missing, count)
    return repeats + rounds + (np.arange(count) < rest)
