"""Micro-batches whose kernels are recorded once and then started as one CUDA graph.

A LoRA step starts thousands of small kernels, and a GPU is done with most of them before the next
one is started: on an H100, SD 1.5's step at 512 px takes 117 ms, and 28 as a graph. A graph
computes the same kernels in the same order, without the waiting.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raylora.base.log import get_logger
from raylora.memory.setting import Setting

log = get_logger("train")

Compute = Callable[[Mapping[str, Tensor]], Tensor]
"""What is drawn and fetched for a micro-batch -> its losses (B,), its gradients added up."""
_SEEN_FIRST = 2
"""Micro-batches of a shape that are computed kernel by kernel: tables and workspaces are made in
the first, and a shape that comes once is not worth recording."""
MOST = 8
"""Recordings that are kept; the oldest goes first."""
_APART = 0.02
"""How far gradients of a recording may lie from those started kernel by kernel, as a part of their
size: a library may choose other kernels for a recording, and 16-bit activations round to 0.4 %."""


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

    Each recording is compared with the same micro-batch started kernel by kernel before it is used.

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
        self._pool: Any = None

    @property
    def count(self) -> int:
        """Recordings that are there."""
        return len(self._recordings)

    def compute(self, key: Hashable, given: Mapping[str, Tensor], compute: Compute) -> Tensor:
        """The losses of a micro-batch, (B,); its gradients are added up.

        Args:
            key: what else the kernels depend on, beside the shapes of what is given.
            given: on the CPU.
        """
        if not self.on:
            return compute(given)
        shapes = tuple((name, one.shape, one.dtype) for name, one in sorted(given.items()))
        found = self._recordings.get((key, shapes))
        if found is None:
            seen = self._seen[key, shapes] = self._seen.get((key, shapes), 0) + 1
            if seen <= _SEEN_FIRST:
                return compute(given)
            found = self._record((key, shapes), given, compute)
            return self._plain_and_compared((key, shapes), found, given, compute)
        return self._play(found, given)

    def _play(self, recording: _Recording, given: Mapping[str, Tensor]) -> Tensor:
        self._forget()
        losses = recording.play(given)
        self._forget()
        return losses

    def _plain_and_compared(
        self,
        key: Hashable,
        recording: _Recording | None,
        given: Mapping[str, Tensor],
        compute: Compute,
    ) -> Tensor:
        """The micro-batch kernel by kernel; a recording that gives something else is not used."""
        if recording is None:
            return compute(given)
        gradients = self._gradients
        assert gradients is not None
        # A step's first micro-batch, as this is as a rule, adds to nothing: no copy beside it.
        before = gradients.clone() if bool(gradients.any()) else torch.zeros_like(gradients[:1])
        plain = compute(given)
        after = gradients.clone()
        gradients.copy_(before)
        played = self._play(recording, given)
        size = (after - before).norm()
        apart = (gradients - after).norm() / size
        gradients.copy_(after)
        if bool(size.isfinite()) and not bool(apart <= _APART and played.isfinite().all()):
            log.warning(
                "kernels are started one by one: a recording's gradients lay %.1e apart", apart
            )
            self.drop()
            self.possible = self.on = False
        elif not bool(size.isfinite()):
            del self._recordings[key]  # nothing was shown; the next time may
        return plain

    def apply(self, setting: Setting) -> None:
        """Begin anew: kernels and places of another setting are others."""
        self.drop()
        # Host memory for what is offloaded is asked for as it goes, which no recording may do.
        self.on = self.possible and not setting.offload

    def drop(self) -> None:
        """Forget the recordings, and let their memory go."""
        if self._recordings:
            torch.cuda.synchronize()
        self._recordings.clear()
        self._seen.clear()
        self._pool = None
        if self.on:
            gc.collect()
            torch.cuda.empty_cache()

    def _record(
        self, key: Hashable, given: Mapping[str, Tensor], compute: Compute
    ) -> _Recording | None:
        """None where something in it cannot be recorded; then nothing is, from here on."""
        while len(self._recordings) >= MOST:
            del self._recordings[next(iter(self._recordings))]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        device = torch.device("cuda", torch.cuda.current_device())
        there = {name: tensor.to(device) for name, tensor in given.items()}
        self._forget()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()  # a recording has memory of its own
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                losses = compute(there)
                self._forget()  # a copy that nobody waited for would be left open
        except torch.OutOfMemoryError:
            self._pool = None
            raise
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            log.warning("kernels are started one by one: a step cannot be recorded (%s)", said)
            self.possible = self.on = False
            self._forget()
            return None
        staged = {name: torch.empty_like(tensor).pin_memory() for name, tensor in given.items()}
        found = self._recordings[key] = _Recording(graph, there, losses, staged)
        return found
