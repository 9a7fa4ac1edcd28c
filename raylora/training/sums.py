"""Adding up a step: over a worker's micro-batches, then over workers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from raylora.adapt.attach import Adapter
from raylora.training.options import MOST_EXACT_IMAGES
from raylora.training.reduce import Group


class Sums(Protocol):
    """The sum of a step's gradients and losses.

    `begin`, then `take` after each micro-batch's backward, then `add_up` once, on every worker.
    """

    held: tuple[Tensor, ...]
    """What it keeps beside the adapter's gradients."""

    def begin(self, batches: int = 1) -> None:
        """Forget what was taken; the adapter's gradients are zero.

        Args:
            batches: how many are to be taken.
        """

    def take(self, losses: Tensor, *, scale: float = 1.0) -> None:
        """Take (B,) losses, and what their backward left in the adapter's gradients.

        Args:
            scale: a power of two that the gradients were multiplied with, one for the step.
        """

    def add_up(self, group: Group, *, stop: bool) -> tuple[Tensor, Tensor]:
        """Leave the sum over workers in the adapter's gradients; (loss sum, how many said stop)."""


class RoundedSums:
    """Sums in the adapter's dtype: the fastest, and rounded in the order of the additions."""

    def __init__(self, adapter: Adapter) -> None:
        self._gradients = adapter.gradients
        self._loss = self._gradients.new_zeros(())
        self._scale = 1.0
        self.held: tuple[Tensor, ...] = (self._loss,)

    def begin(self, batches: int = 1) -> None:
        """Zero both."""
        self._gradients.zero_()
        self._loss.zero_()
        self._scale = 1.0

    def take(self, losses: Tensor, *, scale: float = 1.0) -> None:
        """Autograd has added to the gradients already."""
        self._loss += losses.detach().sum()
        self._scale = scale

    def add_up(self, group: Group, *, stop: bool) -> tuple[Tensor, Tensor]:
        """One sum over workers."""
        if self._scale != 1.0:
            self._gradients.mul_(1.0 / self._scale)
        flag = self._gradients.new_full((), float(stop))  # from a list it would wait for the GPU
        if group.size == 1:
            return self._loss.clone(), flag
        told = torch.cat([self._gradients, self._loss.view(1), flag.view(1)])
        group.add_up(told)
        self._gradients.copy_(told[:-2])
        return told[-2], told[-1]


FRACTION_BITS = 44
"""Bits after the point: steps of 6e-14, far below the 1e-8 that Adam adds to a root."""
_LARGEST = 256.0
"""Of one image's numbers. The largest in the quickstart's 3,146 images is 0.16."""
_AT_ONCE = 2**22
"""Numbers that become integers together, so that no second copy of a large adapter is made."""
assert MOST_EXACT_IMAGES * _LARGEST * 2**FRACTION_BITS < 2**63


class ExactSums:
    """Sums in 64-bit integers: the same bits in any order and over any number of workers.

    Each image's gradients are rounded once, to multiples of 2^-44, and integers add without
    rounding. So images must come one at a time: within a batch the layers themselves add. A value
    that is not finite, or not below 256, makes the whole sum NaN. Steps of up to
    `MOST_EXACT_IMAGES` fit into 64 bits.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._gradients = adapter.gradients
        count = len(self._gradients) + 3  # the loss, how many are broken, how many stop
        self._told = torch.zeros(count, dtype=torch.int64, device=self._gradients.device)
        self.held: tuple[Tensor, ...] = (self._told,)

    def begin(self, batches: int = 1) -> None:
        """Zero both."""
        self._gradients.zero_()
        self._told.zero_()

    def take(self, losses: Tensor, *, scale: float = 1.0) -> None:
        """Move one image's gradients and loss into the integers."""
        if scale != 1.0:
            self._gradients.mul_(1.0 / scale)
        loss = losses.detach().to(self._gradients.dtype)
        largest = [torch.linalg.vector_norm(found, torch.inf) for found in (self._gradients, loss)]
        sound = (torch.stack(largest) < _LARGEST).all()  # False for NaN too
        for told, found in ((self._told[:-3], self._gradients), (self._told[-3:-2], loss)):
            for whole, part in zip(told.split(_AT_ONCE), found.split(_AT_ONCE), strict=True):
                # Scaling by a power of two rounds nothing, in whatever dtype.
                scaled = torch.where(sound, part, 0).mul_(2.0**FRACTION_BITS)
                whole += scaled.round_().to(torch.int64)
        self._told[-2] += ~sound
        self._gradients.zero_()

    def add_up(self, group: Group, *, stop: bool) -> tuple[Tensor, Tensor]:
        """One sum over workers, and back."""
        self._told[-1] = int(stop)
        group.add_up(self._told)
        loss, broken = torch.empty_like(self._gradients[:1]), self._told[-2] > 0
        for summed, told in ((self._gradients, self._told[:-3]), (loss, self._told[-3:-2])):
            summed.copy_(told).mul_(2.0**-FRACTION_BITS).masked_fill_(broken, torch.nan)
        return loss[0], self._told[-1]
