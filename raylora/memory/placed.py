"""A frozen model whose units lie and are computed as a setting says.

Where a unit lies, and whether it is computed again, never changes what it gives: every setting's
numbers are those of the plain model, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from raylora.base.unit import Unit
from raylora.memory.checkpoint import again, recomputed_units
from raylora.memory.host import HostMemory, host_tensor
from raylora.memory.offload import Offload
from raylora.memory.setting import BaseKind, Setting
from raylora.memory.stream import (
    Packing,
    Ring,
    Streamed,
    begins_at,
    dense_stride,
    packing_of,
    streamed_units,
)

Forward = Callable[..., Any]


class Placed:
    """A model on a device, as the last `apply` has it.

    Attributes:
        setting: the last one applied.
        streamed: numbers of the units that lie on the host.

    Args:
        model: frozen; its weights may lie anywhere. Nothing moves before `apply`.
        units: of it, in the order in which they run; what is in none stays on the device.
        host: where streamed weights lie, closed by whoever gives it; None is memory of its own.
        base: how the units' linears are held.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        *,
        device: torch.device,
        host: HostMemory | None = None,
        base: BaseKind = "full",
    ) -> None:
        self.model = model
        self.units = tuple(units)
        self.device = torch.empty(0, device=device).device  # as tensors name it: cuda is cuda:0
        self.base: BaseKind = base
        self.setting = Setting()
        self._host = host or HostMemory()
        self._on_host: dict[int, Streamed] = {}
        self._ring: Ring | None = None
        self._turn: dict[int, int] = {}
        self._again: frozenset[int] = frozenset()
        self._mlp_again: frozenset[int] = frozenset()
        self._offload: Offload | None = None
        self._placed = False
        self._sizes: list[int] = []
        self._routed: list[tuple[nn.Module, Forward | None]] = []
        for number, unit in enumerate(self.units):
            self._route(unit.module, number, self._run)
            for part in unit.mlp:
                self._route(part, number, self._run_mlp)

    @property
    def streamed(self) -> tuple[int, ...]:
        """Numbers of the units that lie on the host."""
        return tuple(sorted(self._on_host))

    @property
    def resident_bytes(self) -> int:
        """Weights that lie on the device all the time."""
        held = {id(t): t.nbytes for module in self._outside() for t in _own(module)}
        for number, unit in enumerate(self.units):
            if number not in self._on_host:
                held |= {id(t): t.nbytes for module in unit.module.modules() for t in _own(module)}
        return sum(held.values())

    @property
    def streamed_bytes(self) -> int:
        """Weights that lie on the host."""
        return sum(one.packing.bytes for one in self._on_host.values())

    @property
    def ring_bytes(self) -> int:
        """Device memory that these come through."""
        return 0 if self._ring is None else self._ring.bytes

    def apply(self, setting: Setting) -> None:
        """Have it so from the next pass on; what a setting gives up is freed.

        Where memory runs out half-way, every unit is in one place or the other, and the next call
        begins there.
        """
        if not self._sizes:
            self._sizes = [_held_bytes(unit.module, self.base) for unit in self.units]
        wanted = frozenset(streamed_units(self._sizes, setting.streamed))
        if not self._placed:
            self._place_first(wanted)
        if wanted != self._on_host.keys() or (wanted and self._ring is None):
            self._drop_ring()
            for number in sorted(wanted - self._on_host.keys()):
                self._to_host(number)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # what units leave behind are holes between others
            for number in sorted(self._on_host.keys() - wanted):
                self._to_device(number)
            self._make_ring()
        recomputed = frozenset(recomputed_units(self.units, setting.checkpointing))
        self._again = recomputed | wanted
        whole = frozenset(range(len(self.units)))
        self._mlp_again = whole - self._again if setting.checkpointing == "mlp" else frozenset()
        if setting.offload != (self._offload is not None):
            self._end_offload()
            self._offload = Offload(self.device) if setting.offload else None
        self.setting = setting

    def forget(self) -> None:
        """Bring every streamed unit anew in the next pass, which may be one that is recorded."""
        if self._ring is not None:
            self._ring.forget()

    def close(self) -> None:
        """Give back what lies on the host; the model is not to be run any more."""
        self._drop_ring()
        self._end_offload()
        for module, before in reversed(self._routed):
            del module.forward
            if before is not None:
                module.forward = before
        self._routed.clear()
        for number, one in self._on_host.items():
            if self.device.type != "meta":
                self._host.free(self._key(number, one.packing))
        self._on_host.clear()
        self._turn.clear()

    # -- where weights lie

    def _place_first(self, wanted: frozenset[int]) -> None:
        """Everything to its place, one unit after the other, so that no more is held meanwhile."""
        _move(self._packing(self._outside()), self.device)
        for number, unit in enumerate(self.units):
            if number in self._on_host:  # by an earlier try, that ran out of memory
                continue
            if self.base != "full":
                from raylora.memory.bases import hold_linears

                hold_linears(unit, self.base, self.device)
            if number in wanted:
                self._to_host(number)
            else:
                _move(self._packing(unit.module.modules()), self.device)
        self._placed = True

    def _to_host(self, number: int) -> None:
        packing = self._packing(self.units[number].module.modules())
        if self.device.type == "meta":
            buffer = host_tensor([packing.bytes], torch.uint8, meta=True)
        else:
            buffer = self._host.buffer(self._key(number, packing), packing.bytes, packing.pack)
        views = packing.views(buffer)
        packing.put(views)
        self._on_host[number] = Streamed(packing, buffer, views)

    def _to_device(self, number: int) -> None:
        packing = self._on_host[number].packing
        _move(packing, self.device, copy=True)
        del self._on_host[number]
        if self.device.type != "meta":
            self._host.free(self._key(number, packing))

    def _packing(self, modules: Iterable[nn.Module]) -> Packing:
        return packing_of(list(modules), as_they_lie=self.device.type == "cpu")

    def _key(self, number: int, packing: Packing) -> str:
        described = hashlib.sha256(packing.describe().encode()).hexdigest()
        return f"{self.units[number].name} {self.base} {described}"

    def _make_ring(self) -> None:
        order = self.streamed
        self._turn = {number: turn for turn, number in enumerate(order)}
        if order and self._ring is None:
            self._ring = Ring([self._on_host[number] for number in order], self.device)

    def _drop_ring(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _end_offload(self) -> None:
        if self._offload is not None:
            self._offload.close()
            self._offload = None

    def _outside(self) -> list[nn.Module]:
        """Modules that are in no unit."""
        within = {id(module) for unit in self.units for module in unit.module.modules()}
        return [module for module in self.model.modules() if id(module) not in within]

    # -- how units run

    def _route(self, module: nn.Module, number: int, run: Callable[..., Any]) -> None:
        own = module.forward

        def forward(*inputs: Any, **words: Any) -> Any:
            return run(number, own, inputs, words)

        self._routed.append((module, module.__dict__.get("forward")))
        module.forward = forward

    def _run_mlp(self, number: int, own: Forward, inputs: Any, words: Any) -> Any:
        if number in self._mlp_again:
            return again(own, *inputs, **words)
        return own(*inputs, **words)

    def _run(self, number: int, own: Forward, inputs: Any, words: Any) -> Any:
        if number not in self._again or not torch.is_grad_enabled():
            with self._present(number, backward=False):
                return own(*inputs, **words)
        visits = 0

        def visit(*inputs: Any, **words: Any) -> Any:
            nonlocal visits
            visits += 1  # autograd calls it again, whatever thread it is in
            with self._present(number, backward=visits > 1):
                return own(*inputs, **words)

        if self._offload is None:
            return again(visit, *inputs, **words)
        names, given = list(words), len(inputs)
        away, kept = self._offload.take([*inputs, *words.values()])

        def visit_with_what_was_away(*kept: Any) -> Any:
            every = away.filled(kept)
            return visit(*every[:given], **dict(zip(names, every[given:], strict=True)))

        return again(visit_with_what_was_away, *kept)

    def _present(self, number: int, *, backward: bool) -> AbstractContextManager[None]:
        if number not in self._turn:
            return nullcontext()
        assert self._ring is not None, "streamed units are there, and `apply` has not ended"
        return self._ring.present(self._turn[number], backward=backward)


def _own(module: nn.Module) -> list[Tensor]:
    """The tensors that a module has itself."""
    kept = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in kept if tensor is not None]


def _move(packing: Packing, device: torch.device, *, copy: bool = False) -> None:
    """Have weights on a device, each by itself."""
    made: dict[int, Tensor] = {}
    for piece in packing.pieces:
        held = piece.held
        if held.device == device and not copy:
            continue
        if piece.offset not in made:
            made[piece.offset] = piece.like(_copied(held.detach(), device))
        piece.put(made[piece.offset])


def _copied(held: Tensor, device: torch.device) -> Tensor:
    if device.type != "cpu" or not (begin := begins_at(held)):
        return held.to(device, copy=True)
    numbers = begin // held.element_size()
    room = torch.empty(held.numel() + numbers, dtype=held.dtype)
    return room[numbers:].as_strided(held.shape, dense_stride(held)).copy_(held)


def _held_bytes(module: nn.Module, base: BaseKind) -> int:
    """Bytes of a unit's weights as they are or will be held."""
    if base == "full":
        return sum(tensor.nbytes for one in module.modules() for tensor in _own(one))
    from raylora.memory.bases import get_base

    found = 0
    for one in module.modules():
        own = _own(one)
        if type(one) is nn.Linear:
            found += get_base(base).bytes_of(one.out_features, one.in_features)
            own = [] if one.bias is None else [one.bias]
        found += sum(tensor.nbytes for tensor in own)
    return found
