"""Doing in halves what does not fit into memory whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_halves(work: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """`work` of a batch, (B, ...); out of memory does its halves one after the other.

    Raises:
        torch.OutOfMemoryError: a single sample does not fit.
    """
    try:
        return work(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Not within `except`, whose traceback holds tensors.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    middle = len(batch) // 2
    return torch.cat([in_halves(work, batch[:middle]), in_halves(work, batch[middle:])])
