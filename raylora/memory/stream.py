"""Weights that lie on the host and come to the device when their unit runs.

Frozen weights never change, so they are only ever copied to the device. Of each unit they are one
packed buffer, which one copy brings; two places on the device take turns, so that the next unit
comes while one computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 256
"""Bytes that every tensor of a packed buffer begins at a multiple of, as kernels like it."""
_CACHE_LINE = 64
_HALF = 0.5 - 1e-9  # a tie is streamed, however the shares before it were rounded


def streamed_units(sizes: Sequence[int], share: float) -> tuple[int, ...]:
    """Which units are streamed, so that all along the model about `share` of the bytes are.

    Args:
        sizes: bytes of each unit, in the order in which they run.
        share: 0 to 1.
    """
    owed, found = 0.0, []
    for number, size in enumerate(sizes):
        owed += share * size
        if share > 0 and owed >= _HALF * size:
            found.append(number)
            owed -= size
    return tuple(found)


def ring_bytes(sizes: Sequence[int]) -> int:
    """Device memory that units of these sizes are streamed through."""
    return min(2, len(sizes)) * max(sizes, default=0)


@dataclass(frozen=True)
class Piece:
    """A weight within a packed buffer.

    Attributes:
        owner, word: the module that has it, and its name there.
        parameter: it is a parameter rather than a buffer.
        offset: where it begins, in bytes.
    """

    owner: nn.Module
    word: str
    parameter: bool
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def bytes(self) -> int:
        """Without what fills it up to the next."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def held(self) -> Tensor:
        """What the module has there now."""
        kept: dict[str, Any] = self.owner._parameters if self.parameter else self.owner._buffers
        found: Tensor = kept[self.word]
        return found

    def put(self, tensor: Tensor) -> None:
        """Have the module compute with another tensor from now on.

        Not by `parameter.data`: what autograd has saved of the one before must stay what it is.
        """
        kept: dict[str, Any] = self.owner._parameters if self.parameter else self.owner._buffers
        kept[self.word] = tensor

    def within(self, buffer: Tensor) -> Tensor:
        """The weight as a view into a packed buffer."""
        flat = buffer[self.offset : self.offset + self.bytes].view(self.dtype)
        return self.like(flat.as_strided(self.shape, self.stride))

    def like(self, tensor: Tensor) -> Tensor:
        """The tensor as the module wants it."""
        return nn.Parameter(tensor, requires_grad=False) if self.parameter else tensor


@dataclass(frozen=True)
class Packing:
    """How weights lie in one buffer."""

    pieces: tuple[Piece, ...]
    bytes: int

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Each piece within a buffer; what two modules share is one tensor."""
        made: dict[int, Tensor] = {}
        for piece in self.pieces:
            if piece.offset not in made:
                made[piece.offset] = piece.within(buffer)
        return [made[piece.offset] for piece in self.pieces]

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Give the modules other tensors."""
        for piece, tensor in zip(self.pieces, tensors, strict=True):
            piece.put(tensor)

    def pack(self, buffer: Tensor) -> None:
        """Write what the modules have now into a buffer."""
        for piece in self.pieces:
            piece.within(buffer).copy_(piece.held)

    def describe(self) -> str:
        """The same for the same packing, in any process."""
        parts = [f"{piece.offset} {piece.dtype} {tuple(piece.shape)}" for piece in self.pieces]
        return "; ".join(parts)


def packing_of(modules: Sequence[nn.Module], *, as_they_lie: bool = False) -> Packing:
    """How all weights and buffers that these modules have themselves are packed.

    Args:
        as_they_lie: each begins as far within a cache line as it does now (`begins_at`).
    """
    pieces: list[Piece] = []
    places: dict[int, int] = {}
    end = 0
    for owner in modules:
        for kept in (owner._parameters, owner._buffers):
            for word, tensor in kept.items():
                if tensor is None:
                    continue
                if id(tensor) not in places:
                    begin = begins_at(tensor) if as_they_lie else 0
                    places[id(tensor)] = end + begin
                    end += -(-max(begin + tensor.nbytes, 1) // ALIGNMENT) * ALIGNMENT
                pieces.append(
                    Piece(
                        owner,
                        word,
                        kept is owner._parameters,
                        tensor.shape,
                        dense_stride(tensor),
                        tensor.dtype,
                        places[id(tensor)],
                    )
                )
    return Packing(tuple(pieces), end)


def begins_at(tensor: Tensor) -> int:
    """How far within a cache line a tensor begins, in bytes.

    On a CPU, products and convolutions of the same numbers are rounded otherwise where they begin
    elsewhere; a file's weights, mapped, begin anywhere.
    """
    begin = 0 if tensor.is_meta else tensor.data_ptr() % _CACHE_LINE
    return begin if begin % tensor.element_size() == 0 else 0


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a copy without gaps: its own where it has none, since kernels choose by it."""
    dense, places = 1, sorted(range(tensor.dim()), key=lambda place: tensor.stride(place))
    for place in places:
        if tensor.shape[place] != 1 and tensor.stride(place) != dense:
            break
        dense *= tensor.shape[place]
    else:
        return tensor.stride()
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@dataclass
class Streamed:
    """A unit on the host.

    Attributes:
        host: its packed weights.
        on_host: views into it, which the modules have while the unit does not run.
        in_slot: views into each place on the device.
    """

    packing: Packing
    host: Tensor
    on_host: list[Tensor]
    in_slot: list[list[Tensor]] = field(default_factory=list)


@dataclass
class _Slot:
    buffer: Tensor
    holds: int | None = None
    ready: Any = None


class Ring:
    """Two places on the device that streamed units take turns in.

    A place is written again once all that was started before is done. That is enough in the
    backward pass too: autograd runs whatever was made last first, so that of a unit all is started
    before the unit in front of it is computed again.

    Args:
        units: in the order in which they run.
    """

    def __init__(self, units: Sequence[Streamed], device: torch.device) -> None:
        self._units = list(units)
        largest = max(unit.packing.bytes for unit in units)
        self._slots = [
            _Slot(torch.empty(largest, dtype=torch.uint8, device=device))
            for _ in range(min(2, len(units)))
        ]
        # All made here: within inference mode they could not be saved for a later backward pass.
        for unit in self._units:
            unit.in_slot = [unit.packing.views(slot.buffer) for slot in self._slots]
        self._last = len(self._slots) - 1
        self._device = device
        self._copies: Any = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)
            for slot in self._slots:  # nobody else gets its memory while a copy is on its way
                slot.buffer.record_stream(self._copies)

    @property
    def bytes(self) -> int:
        """On the device."""
        return sum(slot.buffer.nbytes for slot in self._slots)

    @contextmanager
    def present(self, number: int, *, backward: bool) -> Iterator[None]:
        """Within it, a unit's modules have their weights on the device.

        Args:
            number: of the unit among those that are streamed.
            backward: it is computed again, so that the one in front of it comes next.
        """
        unit = self._units[number]
        slot = self._bring(number)
        self._bring_next(number, backward=backward)
        unit.packing.put(unit.in_slot[slot])
        try:
            yield
        finally:
            unit.packing.put(unit.on_host)

    def forget(self) -> None:
        """Take nothing for granted of what is on the device: another pass may have written there.

        What is on its way arrives before anything that is started from now on.
        """
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copies)
        for slot in self._slots:
            slot.holds = None

    def close(self) -> None:
        """Wait for what is on its way."""
        if self._copies is not None:
            self._copies.synchronize()
        for unit in self._units:
            unit.in_slot.clear()
        self._slots.clear()

    def _bring(self, number: int) -> int:
        """The slot that a unit is in, for what is started from now on."""
        slot = self._slot_of(number)
        if slot is None:
            slot = self._other()
            self._copy(number, slot)
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(self._slots[slot].ready)
        self._last = slot
        return slot

    def _bring_next(self, number: int, *, backward: bool) -> None:
        following = number - 1 if backward else number + 1
        if following == len(self._units):
            # The backward pass begins with the last ones, which are there; another pass forward
            # begins with the first.
            following = -1 if torch.is_grad_enabled() else 0
        if following >= 0 and self._slot_of(following) is None:
            self._copy(following, self._other())

    def _slot_of(self, number: int) -> int | None:
        return next((i for i, slot in enumerate(self._slots) if slot.holds == number), None)

    def _other(self) -> int:
        """The slot that was not used last."""
        return (self._last + 1) % len(self._slots)

    def _copy(self, number: int, slot: int) -> None:
        place, unit = self._slots[slot], self._units[number]
        place.holds = None  # until it is known to come
        target = place.buffer[: unit.packing.bytes]
        if self._copies is None:
            target.copy_(unit.host)
        else:
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._copies):
                target.copy_(unit.host, non_blocking=True)
            place.ready = self._copies.record_event()
        place.holds = number
