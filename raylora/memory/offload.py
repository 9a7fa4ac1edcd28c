"""What units that are computed again were given waits on the host, and comes back bit by bit equal.

Copies run beside the computing: away while the unit computes, back while the unit behind it is in
its backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raylora.memory.host import host_tensor
from raylora.memory.stream import dense_stride


class Offload:
    """Takes inputs away, and remembers the order in which they went."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._seen: dict[int, weakref.ref[Tensor]] = {}
        self._last: weakref.ref[Away] | None = None

    def take(self, inputs: Sequence[Any]) -> tuple[Away, list[Any]]:
        """Begin to take a unit's inputs away.

        Returns:
            What is away, and all inputs with None in its places.
        """
        goes = {place: one for place, one in enumerate(inputs) if self._goes(one)}
        away = Away(self, goes, None if self._last is None else self._last())
        self._last = weakref.ref(away)
        return away, [None if place in goes else one for place, one in enumerate(inputs)]

    def _goes(self, one: Any) -> bool:
        """Whether an input is worth it: a tensor of this unit alone, part of the graph.

        What several units are given, such as text, is held once however many keep it.
        """
        if not isinstance(one, Tensor) or not one.requires_grad or one.device != self.device:
            return False
        known = self._seen.get(id(one))
        if known is not None and known() is one:
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
        self._on_host = {place: self._copy_away(one) for place, one in goes.items()}
        self._back: dict[int, Tensor] | None = None
        self._ready: Any = None

    def filled(self, kept: Sequence[Any]) -> list[Any]:
        """All inputs: the first time those that were given, then what comes back."""
        here, self._given = self._given, None
        if here is None:
            here = self._take_back()
        return [here.get(place, one) for place, one in enumerate(kept)]

    def _take_back(self) -> Mapping[int, Tensor]:
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
        host = _host_like(here)
        if copies is None:
            return host.copy_(here)
        copies.wait_stream(torch.cuda.current_stream(self._offload.device))
        with torch.cuda.stream(copies):
            host.copy_(here, non_blocking=True)
        here.record_stream(copies)  # its memory is not given to another before it was read
        return host

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
                    back[place].record_stream(copies)
            self._ready = copies.record_event()
        self._back = {place: tensor.requires_grad_(True) for place, tensor in back.items()}


def _host_like(tensor: Tensor) -> Tensor:
    """Host memory for a tensor, with its strides where it has no gaps."""
    flat = host_tensor([tensor.numel()], tensor.dtype, meta=tensor.is_meta)
    return flat.as_strided(tensor.shape, dense_stride(tensor))
