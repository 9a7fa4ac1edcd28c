"""How much memory a worker holds: of its GPU, or of its process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def memory_numbers(device: torch.device) -> dict[str, int]:
    """Bytes held now (`memory_bytes`), at most so far (`peak_bytes`), and, on a GPU, there are.

    Allocated tensors on a GPU; what is resident of the process on a CPU.
    """
    peak = peak_bytes(device)
    if device.type != "cuda":
        now = _resident_bytes(peak)  # the kernel counts the two apart, and one may lag
        return {"memory_bytes": now, "peak_bytes": max(peak, now)}
    _, total = torch.cuda.mem_get_info(device)
    held = int(torch.cuda.memory_allocated(device))
    return {"memory_bytes": held, "peak_bytes": peak, "total_bytes": total}


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident_bytes(peak: int) -> int:
    """What is resident now, where the system says so (Linux); the most so far elsewhere."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak
    return pages * resource.getpagesize()
