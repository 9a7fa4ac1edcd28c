"""Models that visit the device: one at a time, whole where it fits, streamed by blocks where not.

What encodes and what draws previews needs a VAE and text encoders for moments only. A text encoder
may be larger than the card; then its blocks lie on the host and come while it reads, which gives
the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from raylora.base.log import get_logger
from raylora.base.unit import Unit
from raylora.base.units import GIB, gib
from raylora.components.lent import Load
from raylora.families import Family
from raylora.memory.host import as_host, lies_on_host
from raylora.memory.options import MemoryOptions
from raylora.memory.placed import Placed
from raylora.memory.setting import Setting
from raylora.memory.tracker import PeakTracker

log = get_logger("memory")

_META = torch.device("meta")
_HOST = torch.device("cpu")
_RING = 2  # slots that streamed units come into
UnitsOf = Callable[[str, nn.Module], Sequence[Unit]]
FreeBytes = Callable[[], float]


@dataclass
class _Visitor:
    model: nn.Module
    placed: Placed | None = None


class Lending:
    """A `Lender` that minds how much is free.

    Args:
        units_of: the blocks of a model by its component; none: it is never streamed.
        free_bytes: what a model and its activations may take, asked before it is loaded.
        keep: models stay once they were asked for, until `close`; otherwise each leaves when the
            next is asked for, or at `clear`.
        budget: follows the tensors of a CPU that stands for a small card.
    """

    def __init__(
        self,
        device: torch.device,
        units_of: UnitsOf,
        *,
        free_bytes: FreeBytes = lambda: float("inf"),
        keep: bool = False,
        budget: PeakTracker | None = None,
    ) -> None:
        self.device = device
        self._units_of, self._free_bytes = units_of, free_bytes
        self._keep, self._budget = keep, budget
        self._visiting: dict[str, _Visitor] = {}

    @contextmanager
    def lend(self, component: str, load: Load, *, work_bytes: int = 0) -> Iterator[nn.Module]:
        """The model, whole on the device or with blocks that come from the host."""
        if component not in self._visiting:
            self.clear()
            self._visiting[component] = self._bring(component, load, work_bytes)
        try:
            yield self._visiting[component].model
        except torch.OutOfMemoryError:
            self.clear()
            raise

    def aside(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the host, where a budget does not count it."""
        if self._budget is None:
            return tensor.cpu()
        if lies_on_host(tensor.untyped_storage()):
            return tensor
        with self._counting():
            return as_host(tensor.clone())

    def clear(self) -> None:
        """All leave, unless they are kept."""
        if not self._keep:
            self.close()

    def close(self) -> None:
        """All leave."""
        if not self._visiting:
            return
        for visitor in self._visiting.values():
            if visitor.placed is not None:
                visitor.placed.close()
        self._visiting.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _bring(self, component: str, load: Load, work_bytes: int) -> _Visitor:
        free = self._free_bytes() - work_bytes
        if free == float("inf"):
            return self._whole(load)
        with self._counting():
            empty = load(_META)
        size, units = _bytes(empty), self._units_of(component, empty)
        if size <= free or not units:
            return self._whole(load)
        share = streamed_share(size, [_bytes(unit.module) for unit in units], free)
        log.info(
            "%s: %s in float weights, %s free: %.0f %% of its blocks come from the host",
            *(component, gib(size), gib(max(0, int(free))), 100 * share),
        )
        with self._counting():
            model = load(_HOST)
        placed = Placed(model, self._units_of(component, model), device=self.device)
        placed.apply(Setting(streamed=share))
        with self._counting() as count:
            count(model)
        return _Visitor(model, placed)

    def _whole(self, load: Load) -> _Visitor:
        with self._counting() as count:
            model = load(self.device)
            count(model)
        return _Visitor(model)

    @contextmanager
    def _counting(self) -> Iterator[Callable[[nn.Module], None]]:
        """Within it, a budget counts what it is given alone: on a CPU it cannot tell from another
        what is loaded to lie on the host."""
        budget = self._budget
        if budget is None:
            yield lambda model: None
            return
        with _disable_current_modes():
            yield lambda model: budget.add(_tensors(model))


def streamed_share(whole_bytes: int, unit_bytes: Sequence[int], free_bytes: float) -> float:
    """Share of the units' bytes that has to lie on the host, for the model to fit.

    Args:
        whole_bytes: of the model.
    """
    units, largest = sum(unit_bytes), max(unit_bytes)
    # One more than the ring has: units are taken whole, so that the share is not met exactly.
    left = free_bytes - (whole_bytes - units) - (_RING + 1) * largest
    return min(1.0, max(0.0, 1 - left / units))


def lending_of(
    family: Family,
    options: MemoryOptions,
    device: torch.device,
    *,
    keep: bool = False,
    budget: PeakTracker | None = None,
) -> Lending:
    """Who lends a family's VAE and text encoders on a worker's device.

    Args:
        keep: for what is encoded as it is shown.
    """
    return Lending(
        device,
        lambda component, model: _units(family, component, model),
        free_bytes=free_on(device, options, budget),
        keep=keep,
        budget=budget,
    )


def free_on(
    device: torch.device, options: MemoryOptions, budget: PeakTracker | None = None
) -> FreeBytes:
    """Says how much of a device's memory may be taken at any moment, the reserve left; a CPU
    without a budget has no limit."""

    reserve = options.reserve_gib * GIB

    def free() -> float:
        if budget is not None and budget.limit_bytes is not None:
            return budget.limit_bytes - budget.now_bytes - reserve
        if device.type != "cuda":
            return float("inf")
        there, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
        # What the allocator keeps for later counts as free.
        there += torch.cuda.memory_reserved(device) - held
        if options.budget_gib is not None:
            there = min(there, int(options.budget_gib * GIB) - held)
        return there - reserve

    return free


def _units(family: Family, component: str, model: nn.Module) -> Sequence[Unit]:
    if component not in family.text_components:
        return []
    return family.text_units({component: model})[component]


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return chain(model.parameters(), model.buffers())


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(model))
