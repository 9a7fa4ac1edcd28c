"""Doing in halves what does not fit into memory whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")


def in_halves(
    work: Callable[[Tensor], Found],
    batch: Tensor,
    *,
    join: Callable[[Sequence[Found]], Found] = torch.cat,  # type: ignore[assignment]
) -> Found:
    """`work` of a batch, (B, ...); out of memory does its halves one after the other.

    Args:
        join: of two halves' results, which is `torch.cat` for tensors.

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
    halves = (batch[:middle], batch[middle:])
    return join([in_halves(work, half, join=join) for half in halves])
