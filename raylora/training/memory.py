"""How much memory a worker holds: of its GPU, of its budget, or of its process."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from raylora.memory.budget import Budget


class DeviceMemory:
    """What a worker's device holds, and held at most.

    Allocated tensors on a GPU or under a budget; what is resident of the process on a CPU.

    Args:
        budget: of a CPU that has one.
        limit_bytes: of a GPU, where a job gives less than there is.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        budget: Budget | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        self.budget = budget
        self._device = device
        self._tracker = budget.tracker if budget else None
        self._limit_bytes = limit_bytes

    def numbers(self) -> dict[str, int]:
        """Bytes held now (`memory_bytes`), at most so far (`peak_bytes`), and, where there is a
        limit, what there is (`total_bytes`)."""
        if self._tracker is not None:
            held = {"memory_bytes": self._tracker.now_bytes, "peak_bytes": self._tracker.peak_bytes}
            limit = self._tracker.limit_bytes
            return held if limit is None else {**held, "total_bytes": limit}
        peak = self.peak_bytes
        if self._device.type != "cuda":
            now = _resident_bytes(peak)  # the kernel counts the two apart, and one may lag
            return {"memory_bytes": now, "peak_bytes": max(peak, now)}
        _, total = torch.cuda.mem_get_info(self._device)
        held_bytes = int(torch.cuda.memory_allocated(self._device))
        limit_bytes = min(total, self._limit_bytes or total)
        return {"memory_bytes": held_bytes, "peak_bytes": peak, "total_bytes": limit_bytes}

    @property
    def peak_bytes(self) -> int:
        """Most memory held so far, or since `forget_peak`."""
        if self._tracker is not None:
            return self._tracker.peak_bytes
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Within it, a CPU gives no more than its budget; a GPU never does."""
        with self.budget.enforced() if self.budget else nullcontext():
            yield

    def forget_peak(self) -> None:
        """What is held now is the most so far; of a process the system keeps the peak."""
        if self._tracker is not None:
            self._tracker.begin()
        elif self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)


def _resident_bytes(peak: int) -> int:
    """What is resident now, where the system says so (Linux); the most so far elsewhere."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak
    return pages * resource.getpagesize()
