"""Micro-batches whose kernels are recorded once and then started as one CUDA graph.

A LoRA step starts thousands of small kernels, and a GPU is done with most of them before the next
one is started: on an H100, SD 1.5's step at 512 px takes 117 ms, and 28 as a graph. A graph
computes the same kernels in the same order, without the waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raylora.base.log import get_logger
from raylora.memory.setting import Setting
from raylora.training.fitting import free_unused

log = get_logger("train")

Compute = Callable[[Mapping[str, Tensor]], Tensor]
"""What is drawn and fetched for a micro-batch -> its losses (B,), its gradients added up."""
_SEEN_FIRST = 2
"""Micro-batches of a shape that are computed kernel by kernel: tables and workspaces are made in
the first, and a shape that comes once is not worth recording."""
MOST = 8
"""Recordings that are kept; shapes that come later are computed kernel by kernel, since recording
one takes the time of many steps."""
_APART = 0.02
"""How far what a recording gives may lie from what kernels started one by one give, as a part of
its size: a library may choose other kernels for it, and 16-bit activations round to 0.4 %."""


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    given: dict[str, Tensor]
    losses: Tensor
    staged: dict[str, Tensor]
    copied: torch.cuda.Event = field(default_factory=torch.cuda.Event)

    def play(self, given: Mapping[str, Tensor]) -> Tensor:
        # What was staged last must have left before it is overwritten.
        self.copied.synchronize()
        for name, tensor in given.items():
            self.staged[name].copy_(tensor)
            self.given[name].copy_(self.staged[name], non_blocking=True)
        self.copied.record()
        self.graph.replay()
        return self.losses.clone()


class Graphs:
    """Computes micro-batches, from recordings where it has them.

    Nothing a recording computes may depend on anything but what it is given and on tensors that
    stay where they are: where a setting changes, all are dropped.

    Each is compared with the same micro-batch started kernel by kernel before it is kept. That one
    runs first, for a recording holds the memory of a micro-batch as long as it is there.

    Args:
        possible: nothing of the job stands against it; False computes everything kernel by kernel.
        gradients: where they are added up.
        forget: called before and after what is recorded runs, for whoever remembers what lies on
            the device from one pass to the next.
    """

    def __init__(
        self,
        *,
        possible: bool = False,
        gradients: Tensor | None = None,
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        assert gradients is not None or not possible, "what is recorded is compared by them"
        self.possible = possible
        self.on = possible
        self._gradients = gradients
        self._forget = forget
        self._recordings: dict[Hashable, _Recording] = {}
        self._seen: dict[Hashable, int] = {}
        self._key: Hashable = None
        self._pool: Any = None
        self._bytes = 0

    @property
    def count(self) -> int:
        """Recordings that are there."""
        return len(self._recordings)

    def compute(self, key: Hashable, given: Mapping[str, Tensor], compute: Compute) -> Tensor:
        """The losses of a micro-batch, (B,); its gradients are added up.

        Args:
            key: what else the kernels depend on, beside the shapes of what is given; recordings of
                another are dropped.
            given: on the CPU.
        """
        if not self.on:
            return compute(given)
        if key != self._key:
            self.drop()
            self._key = key
        shapes = tuple((name, one.shape, one.dtype) for name, one in sorted(given.items()))
        found = self._recordings.get(shapes)
        if found is not None:
            return self._play(found, given)
        seen = self._seen[shapes] = self._seen.get(shapes, 0) + 1
        if seen <= _SEEN_FIRST or self.count >= MOST:
            return compute(given)
        return self._plain_and_recorded(shapes, given, compute)

    def apply(self, setting: Setting) -> None:
        """Begin anew: kernels and places of another setting are others."""
        self.drop()
        self._seen.clear()
        # Host memory for what is offloaded is asked for as it goes, which no recording may do.
        self.on = self.possible and not setting.offload

    def make_room(self) -> None:
        """Before something else than training runs, which may take as much: drop the recordings
        where the device has less left than they hold."""
        if self._recordings and _left_bytes() - self._bytes < self._bytes:
            self.drop()

    def give_up(self) -> bool:
        """Where memory ran out: have none until the next setting; whether there were any."""
        found = bool(self._recordings)
        if found:
            self._stop("there is no room for what was recorded")
        return found

    def drop(self) -> None:
        """Forget the recordings, and let their memory go."""
        self._pool = None
        if not self._recordings:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._recordings.clear()
        self._bytes = 0
        free_unused()

    def _play(self, recording: _Recording, given: Mapping[str, Tensor]) -> Tensor:
        self._forget()
        losses = recording.play(given)
        self._forget()
        return losses

    def _plain_and_recorded(
        self, key: Hashable, given: Mapping[str, Tensor], compute: Compute
    ) -> Tensor:
        """Kernel by kernel, and what is recorded of the same if it gives the same."""
        gradients = self._gradients
        assert gradients is not None
        # Copies lie on the host: a device that has room for a step need not have any for them.
        before = gradients.to("cpu", copy=True)
        plain = compute(given)
        after = gradients.to("cpu", copy=True)
        try:
            recording = self._record(given, compute)
            if recording is not None:
                gradients.copy_(before)
                played = self._play(recording, given)
                self._judge(
                    *(key, recording),
                    _apart(gradients.cpu(), after, before),
                    _apart(played.cpu(), plain.cpu()),
                )
        except torch.OutOfMemoryError:
            recording = played = None
            self._stop("there is no room to record them")
        finally:
            gradients.copy_(after)
        return plain

    def _judge(self, key: Hashable, recording: _Recording, *apart: float) -> None:
        """Keep a recording that gives the same; of NaN, which shows nothing, the next one may."""
        if all(one <= _APART for one in apart):
            self._recordings[key] = recording
        elif not any(math.isnan(one) for one in apart):
            self._stop(f"a recording's numbers lay {max(apart):.1e} apart", for_good=True)

    def _record(self, given: Mapping[str, Tensor], compute: Compute) -> _Recording | None:
        """None where something in it cannot be recorded; then nothing is, from here on."""
        assert self._gradients is not None
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        there = {name: tensor.to(self._gradients.device) for name, tensor in given.items()}
        self._forget()
        torch.cuda.synchronize()
        free_unused()  # a recording has memory of its own
        reserved = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                losses = compute(there)
                self._forget()  # a copy that nobody waited for would be left open
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            self._stop(f"a step cannot be recorded ({said})", for_good=True)
            self._forget()
            return None
        self._bytes += torch.cuda.memory_reserved() - reserved
        staged = {name: torch.empty_like(tensor).pin_memory() for name, tensor in given.items()}
        return _Recording(graph, there, losses, staged)

    def _stop(self, why: str, *, for_good: bool = False) -> None:
        """Start kernels one by one, until the next setting or for good."""
        log.warning("kernels are started one by one: %s", why)
        self.on = False
        self.possible = self.possible and not for_good
        self.drop()


def _apart(found: Tensor, wanted: Tensor, before: Tensor | float = 0.0) -> float:
    """How far numbers lie from those wanted, as a part of how far these are from what was before;
    NaN where these are not finite."""
    size, distance = float((wanted - before).norm()), float((found - wanted).norm())
    if not math.isfinite(size):
        return math.nan
    if not math.isfinite(distance):
        return math.inf
    return distance / size if size else distance


def _left_bytes() -> int:
    """Of the device, that nothing lies in."""
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + cached
