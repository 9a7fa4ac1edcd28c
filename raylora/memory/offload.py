"""What units that are computed again were given waits on the host, and comes back bit by bit equal.

Copies run beside the computing: away while the unit computes, back while the unit behind it is in
its backward pass. Memory is never given to another by an event that the host looks at: the program
runs ahead of the device, and would find none of it free. The device's own streams wait instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raylora.memory.host import HostMemory, host_tensor
from raylora.memory.stream import dense_stride


class Offload:
    """Takes inputs away, and remembers the order in which they went.

    One stream makes all copies, so that a place on the host may be written again as soon as the
    copy from it has been asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.places = _Places()
        self._seen: dict[int, weakref.ref[Tensor]] = {}
        self._last: weakref.ref[Away] | None = None
        self._leaving: tuple[Any, list[Tensor]] | None = None

    def take(self, inputs: Sequence[Any]) -> tuple[Away, list[Any]]:
        """Begin to take a unit's inputs away.

        Returns:
            What is away, and all inputs with None in its places.
        """
        self.let_go()
        goes = {place: one for place, one in enumerate(inputs) if self._goes(one)}
        away = Away(self, goes, None if self._last is None else self._last())
        self._last = weakref.ref(away)
        if self.copies is not None and goes:
            self._leaving = self.copies.record_event(), list(goes.values())
        return away, [None if place in goes else one for place, one in enumerate(inputs)]

    def let_go(self) -> None:
        """Free the device's copies of what went last; what is computed from now on waits until it
        is on the host, which it has had a unit's time for."""
        if self._leaving is not None:
            gone, _ = self._leaving
            torch.cuda.current_stream(self.device).wait_event(gone)
            self._leaving = None

    def close(self) -> None:
        """Between two passes, for good."""
        if self.copies is not None:
            self.copies.synchronize()
        self._leaving = None
        self.places.close()

    def _goes(self, one: Any) -> bool:
        """Whether an input is worth it: a tensor of this unit alone, part of the graph.

        What several units are given, such as text, is held once however many keep it.
        """
        if not isinstance(one, Tensor) or not one.requires_grad or one.device != self.device:
            return False
        known = self._seen.get(id(one))
        if (known is not None and known() is one) or not one.numel():
            return False
        key = id(one)
        self._seen[key] = weakref.ref(one, lambda gone: self._forget(key, gone))
        return True

    def _forget(self, key: int, gone: weakref.ref[Tensor]) -> None:
        if self._seen.get(key) is gone:
            del self._seen[key]


class Away:
    """Inputs of one call of a unit, by their places.

    Args:
        before: those of the call before it, which are wanted next in the backward pass.
    """

    def __init__(self, offload: Offload, goes: Mapping[int, Tensor], before: Away | None) -> None:
        self._offload = offload
        self._before = None if before is None else weakref.ref(before)
        self._given: Mapping[int, Tensor] | None = goes
        self._back: dict[int, Tensor] | None = None
        self._ready: Any = None
        self._on_host: dict[int, Tensor] = {}
        for place, one in goes.items():
            self._on_host[place] = self._copy_away(one)

    def filled(self, kept: Sequence[Any]) -> list[Any]:
        """All inputs: the first time those that were given, then what comes back."""
        here, self._given = self._given, None
        if here is None:
            here = self._take_back()
        return [here.get(place, one) for place, one in enumerate(kept)]

    def __del__(self) -> None:
        if self._back is not None and self._ready is not None:  # asked for, and not used
            torch.cuda.current_stream(self._offload.device).wait_event(self._ready)
        for host in self._on_host.values():
            self._offload.places.give(host)

    def _take_back(self) -> Mapping[int, Tensor]:
        self._offload.let_go()
        self._bring_back()
        assert self._back is not None
        if self._ready is not None:
            torch.cuda.current_stream(self._offload.device).wait_event(self._ready)
        back, self._back = self._back, None
        before = None if self._before is None else self._before()
        if before is not None and before._given is None:
            before._bring_back()
        return back

    def _copy_away(self, tensor: Tensor) -> Tensor:
        copies, here = self._offload.copies, tensor.detach()
        host = self._offload.places.take(here)
        if copies is None:
            return host.copy_(here)
        copies.wait_stream(torch.cuda.current_stream(self._offload.device))
        with torch.cuda.stream(copies):
            return host.copy_(here, non_blocking=True)

    def _bring_back(self) -> None:
        """Begin to bring all back."""
        if self._back is not None:
            return
        copies, device = self._offload.copies, self._offload.device
        back = {
            place: torch.empty_like(host, device=device) for place, host in self._on_host.items()
        }
        if copies is None:
            for place, host in self._on_host.items():
                back[place].copy_(host)
        else:
            copies.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(copies):
                for place, host in self._on_host.items():
                    back[place].copy_(host, non_blocking=True)
            self._ready = copies.record_event()
        self._back = {place: tensor.requires_grad_(True) for place, tensor in back.items()}


class _Places:
    """Host memory that is used again and again; as many buffers as are away at once."""

    def __init__(self) -> None:
        self._memory = HostMemory()
        self._free: list[tuple[str, Tensor]] = []
        self._taken: dict[int, tuple[str, Tensor]] = {}
        self._made = 0

    def take(self, tensor: Tensor) -> Tensor:
        """Room for a tensor, with its strides where it has no gaps."""
        key, buffer = self._buffer(tensor.numel() * tensor.element_size(), meta=tensor.is_meta)
        flat = buffer[: tensor.numel() * tensor.element_size()].view(tensor.dtype)
        host = flat.as_strided(tensor.shape, dense_stride(tensor))
        self._taken[id(host)] = key, buffer
        return host

    def give(self, host: Tensor) -> None:
        """Let another tensor have it."""
        taken = self._taken.pop(id(host), None)
        if taken is not None:
            self._free.append(taken)

    def close(self) -> None:
        """Give all back; what is away still keeps its own."""
        self._free.clear()
        self._taken.clear()
        self._memory.close()

    def _buffer(self, bytes_: int, *, meta: bool) -> tuple[str, Tensor]:
        fits = [place for place, (_, one) in enumerate(self._free) if one.nbytes >= bytes_]
        if fits:
            return self._free.pop(min(fits, key=lambda place: self._free[place][1].nbytes))
        self._made += 1
        key = str(self._made)
        if meta:
            return key, host_tensor([bytes_], torch.uint8, meta=True)
        if self._free:
            # A larger one takes its place: buckets of many sizes must not each have their own.
            smaller, _ = self._free.pop()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._memory.free(smaller)
        return key, self._memory.buffer(key, bytes_, lambda buffer: None)
