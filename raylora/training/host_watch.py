"""Noticing that the host runs out of memory, before the system ends a process for it."""

from __future__ import annotations

from collections.abc import Callable

from raylora.base.units import GIB, gib
from raylora.memory.probe import free_host_bytes
from raylora.training.fitting import Tell

MARGIN_BYTES = GIB
"""Free host memory below which a run warns."""


class HostWatch:
    """Looks at a worker's host now and then, and says once that little is left.

    Args:
        free_bytes: what is left; the machine's and the control group's.
    """

    def __init__(self, free_bytes: Callable[[], int] = free_host_bytes) -> None:
        self._free_bytes = free_bytes
        self._said = False

    def look(self, step: int, tell: Tell) -> None:
        """Look after so many steps."""
        if self._said or (free := self._free_bytes()) >= MARGIN_BYTES:
            return
        self._said = True
        tell(
            "host memory",
            step=step,
            free_bytes=free,
            warning=f"the host has {gib(free)} of memory left. Lower memory.host_gib or "
            "data.local_cache_gib, or end other programs there: where none is left, the system "
            "ends a process.",
        )
