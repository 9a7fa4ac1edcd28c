"""Following the bytes that live tensors hold, on any device and on none.

Under a `PeakTracker` every storage that an operation makes is counted until it is freed: views are
free, sizes are rounded as CUDA's allocator rounds them. On the meta device nothing is computed and
the count is a prediction; on real tensors it is what an allocator was asked for.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raylora.memory.host import lies_on_host
from raylora.memory.need import Curve, Line

BLOCK_BYTES = 512
"""CUDA's allocator gives memory in multiples of it."""


class Amount(NamedTuple):
    """So much, and more for each image, for each rank of an adapter, and for each of both."""

    constant: int = 0
    per_image: int = 0
    per_rank: int = 0
    per_image_and_rank: int = 0

    def at(self, rank: int) -> Line:
        """At one rank."""
        return Line(
            self.constant + self.per_rank * rank, self.per_image + self.per_image_and_rank * rank
        )

    def less(self, other: Amount) -> Amount:
        """What is left of it without another."""
        return Amount(*(mine - its for mine, its in zip(self, other, strict=True)))


class PeakTracker(TorchDispatchMode):
    """Counts the bytes of storages that are made within it, or given to `add`.

    With `images`, tensors of a batch are told from others: a storage whose count of numbers is a
    multiple of it belongs to the batch, and likewise with `rank`. Take large primes, that no other
    size is a multiple of; one run then says what any number of images at any rank needs.

    Args:
        images, rank: how large the batch and the adapter's rank are; None is not told apart.
        limit_bytes: what may be held; beyond it an operation's result is dropped and
            `torch.OutOfMemoryError` raised, as where an allocator has no more. None is no limit.
        device: kind of device whose tensors count; None is all.

    Attributes:
        now_bytes: what is held now, of all images together.
        peak_bytes: the most that was held at once since `begin`.
        before_bytes: what was held at `begin`.
    """

    def __init__(
        self,
        images: int | None = None,
        *,
        rank: int | None = None,
        limit_bytes: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.images = images
        self.rank = rank
        self.limit_bytes = limit_bytes
        self.now_bytes = 0
        self.peak_bytes = 0
        self.before_bytes = 0
        self._device = device
        self._now = Amount()
        self._before = Amount()
        self._fullest: list[Amount] = []
        self._held: dict[int, Held] = {}
        self._free = self._freed  # one bound method for all

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count what was made before; a storage that is known already is not counted again."""
        for tensor in tensors:
            self._count(tensor)

    def begin(self) -> None:
        """Forget earlier peaks: what is held now is the most so far, and left out of `moments`."""
        self.peak_bytes = self.before_bytes = self.now_bytes
        self._before = self._now
        self._fullest = [self._now]

    def moments(self) -> tuple[Amount, ...]:
        """What was held beyond what was there at `begin`, at moments of which each may be the
        fullest for some number of images and some rank."""
        return tuple(moment.less(self._before) for moment in self._fullest)

    def curve(self) -> Curve:
        """The same for any number of images, at the rank that was run."""
        return curve_at(self.moments(), self.rank or 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _MAKING or (func not in _ALIASING and makes_new(func)):
            if isinstance(result, Tensor):
                self._count(result)
            elif isinstance(result, tuple | list):
                self.add(one for one in result if isinstance(one, Tensor))
        return result

    def held(self, tensor: Tensor) -> Held | None:
        """What is known of a tensor's storage; None of one that does not count."""
        return self._held.get(tensor.untyped_storage()._cdata)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes()
        if not size or lies_on_host(storage):
            return
        if self._device is not None and storage.device.type != self._device:
            return
        whole = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if self.limit_bytes is not None and self.now_bytes + whole > self.limit_bytes:
            self._make_room(whole)
        told_apart = self.images is not None
        amount = self.amount_of(size, tensor.element_size()) if told_apart else Amount()
        held = Held(storage, self._free)
        held.key, held.bytes, held.amount = key, whole, amount
        self._held[key] = held
        self._hold(whole, amount)

    def _hold(self, whole: int, amount: Amount) -> None:
        self.now_bytes += whole
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        if self.images is not None:
            self._now = now = _sum(self._now, amount)
            self._fullest = with_moment(self._fullest, now)

    def hold_for_a_moment(self, size: int, element_size: int) -> None:
        """Count bytes that an operation takes and has given back when it is done."""
        if size:
            amount, before = self.amount_of(size, element_size), self._now
            self._hold(size, amount)
            self._now = before
            self.now_bytes -= size

    def amount_of(self, size: int, element_size: int) -> Amount:
        """Bytes of a storage as what they grow with, rounded as an allocator does or more."""
        numbers, each = size // element_size, size
        of_batch = self.images is not None and numbers % self.images == 0
        of_rank = self.rank is not None and numbers % self.rank == 0
        each //= (self.images or 1) if of_batch else 1
        each //= (self.rank or 1) if of_rank else 1
        if not of_batch and not of_rank:
            return Amount(constant=-(-each // BLOCK_BYTES) * BLOCK_BYTES)
        # Of any number of them an allocator adds at most 512 - gcd(bytes, 512), and nothing to
        # whole blocks.
        rounding = BLOCK_BYTES - min(each & -each, BLOCK_BYTES)
        if of_batch and of_rank:
            return Amount(rounding, per_image_and_rank=each)
        return Amount(rounding, each) if of_batch else Amount(rounding, per_rank=each)

    def _make_room(self, wanted_bytes: int) -> None:
        gc.collect()  # tensors that only hold one another
        if self.limit_bytes is not None and self.now_bytes + wanted_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"{wanted_bytes} bytes are asked for, {self.now_bytes} are held, and "
                f"{self.limit_bytes} is the limit"
            )

    def _freed(self, held: weakref.ref[torch.UntypedStorage]) -> None:
        assert isinstance(held, Held)
        if self._held.get(held.key) is held:
            del self._held[held.key]
        self.now_bytes -= held.bytes
        if self.images is not None:
            self._now = self._now.less(held.amount)


class Held(weakref.ref[torch.UntypedStorage]):
    """Looks on while a storage lives, and remembers what it was counted as."""

    __slots__ = ("amount", "bytes", "key")

    key: int
    bytes: int
    amount: Amount


_ALIASING: set[Any] = set()
_MAKING: set[Any] = set()


def makes_new(func: Any) -> bool:
    """Whether an operation gives tensors that are neither its arguments nor views of them."""
    if func not in _ALIASING and func not in _MAKING:
        makes = any(one.alias_info is None for one in func._schema.returns)
        (_MAKING if makes else _ALIASING).add(func)
    return func in _MAKING


@cache
def writes(func: Any) -> bool:
    """Whether an operation changes one of its arguments."""
    aliases = (one.alias_info for one in func._schema.arguments)
    return any(alias is not None and alias.is_write for alias in aliases)


def _sum(one: Amount, other: Amount) -> Amount:
    a, b, c, d = one
    e, f, g, h = other
    return Amount(a + e, b + f, c + g, d + h)


def with_moment(fullest: list[Amount], now: Amount) -> list[Amount]:
    """Moments of which each may be the fullest, with one more if nothing holds as much in every
    way."""
    a, b, c, d = now
    for e, f, g, h in fullest:
        if e >= a and f >= b and g >= c and h >= d:
            return fullest
    kept = [m for m in fullest if m[0] > a or m[1] > b or m[2] > c or m[3] > d]
    return [*kept, now]


def curve_at(moments: Iterable[Amount], rank: int) -> Curve:
    """The fullest moments for any number of images, at one rank."""
    return Curve(tuple(_outermost(moment.at(rank) for moment in moments)))


def _outermost(lines: Iterable[Line]) -> list[Line]:
    """Those that are the fullest for some number of images, from 1 on."""
    kept: list[Line] = []
    for line in sorted(lines, key=lambda line: (line.per_image, line.constant)):
        # Slopes rise: the one before is nowhere the fullest where this one is so from its start.
        while kept and _begins(kept[-1], line) <= (_begins(*kept[-2:]) if len(kept) > 1 else 1.0):
            kept.pop()
        kept.append(line)
    return kept


def _begins(lower: Line, steeper: Line) -> float:
    """The number of images from which the steeper one is the fuller."""
    if steeper.per_image == lower.per_image:
        return float("-inf")
    return (lower.constant - steeper.constant) / (steeper.per_image - lower.per_image)
