"""A limit on device memory: of a GPU, by its allocator; of a CPU, by following its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from raylora.base.units import GIB
from raylora.memory.setting import Setting
from raylora.memory.tracker import PeakTracker


class Budget:
    """A CPU as a device with so much memory: beyond it tensors are refused as a GPU refuses them.

    What lies on the host by intent does not count, nor what other threads make: those fetch and
    store, as they would beside a GPU.

    Attributes:
        tracker: follows the tensors.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.tracker = PeakTracker(limit_bytes=limit_bytes)
        self._models: list[nn.Module] = []
        self._tensors: list[Tensor] = []
        self._states: Callable[[], Iterable[Tensor]] = list

    def watch(
        self,
        models: Iterable[nn.Module],
        tensors: Iterable[Tensor],
        states: Callable[[], Iterable[Tensor]] = list,
    ) -> None:
        """Count what of these lies on the device whenever a setting is applied, since it was made
        outside of `enforced`.

        Args:
            states: gives what an optimizer remembers by then.
        """
        self._models += models
        self._tensors += tensors
        self._states = states

    def apply(self, setting: Setting) -> None:
        """What the setting left on the device counts.

        Raises:
            OutOfMemoryError: it is too much.
        """
        self.tracker.add(self._tensors)
        self.tracker.add(self._states())
        for model in self._models:
            self.tracker.add([*model.parameters(), *model.buffers()])

    @contextmanager
    def passed_over(self) -> Iterator[None]:
        """Within it, nothing counts; what stays is to be watched."""
        with _disable_current_modes():
            yield

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Within it, what this thread makes counts."""
        with self.tracker:
            yield


def limit_gpu(device: torch.device, budget_gib: float) -> None:
    """Have a GPU's allocator give no more than a budget."""
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gib * GIB / total), device)
