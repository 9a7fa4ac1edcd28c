"""What a step needs, found by running it on the meta device: bytes, and work.

The step itself is handed in, so this knows no loss, adapter or job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from raylora.base.unit import Unit
from raylora.memory.emulate import Kernels, kernels_of
from raylora.memory.need import Curve, ModelNeed, StepNeed, UnitNeed, Work
from raylora.memory.operations import run, tensors_in
from raylora.memory.tracker import Amount, PeakTracker, curve_at, makes_new, writes

IMAGES = 10007
"""Images of a step that is measured: a prime that no other size of a model is a multiple of."""
RANK = 1009
"""Rank of an adapter whose need is measured for any rank, likewise."""


_ASKS = torch.ops.aten._local_scalar_dense.default


@dataclass(frozen=True)
class Measured:
    """A step that was run, for any number of images at any rank.

    Attributes:
        moments: bytes beyond what was there before, at moments that may be the fullest.
        inputs_per_image: bytes of the batch that modules which are computed again were given.
        matmul_flops, attention_flops, moved_bytes: for an image, and what more for each rank.
        launches: operations that start work on the device.
    """

    moments: tuple[Amount, ...]
    inputs_per_image: int
    matmul_flops: tuple[int, int]
    attention_flops: tuple[int, int]
    moved_bytes: tuple[int, int]
    launches: int

    def at(self, rank: int = 0) -> StepNeed:
        """At one rank; of a step that was measured at its own rank, as it was."""

        def so_much(plain: tuple[int, int]) -> int:
            return plain[0] + plain[1] * rank

        work = Work(
            so_much(self.matmul_flops),
            so_much(self.attention_flops),
            so_much(self.moved_bytes),
            self.launches,
        )
        return StepNeed(self.curve(rank), self.inputs_per_image, work)

    def curve(self, rank: int = 0) -> Curve:
        """The bytes alone."""
        return curve_at(self.moments, rank)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "moments": [list(moment) for moment in self.moments],
            "inputs_per_image": self.inputs_per_image,
            "matmul_flops": list(self.matmul_flops),
            "attention_flops": list(self.attention_flops),
            "moved_bytes": list(self.moved_bytes),
            "launches": self.launches,
        }

    @classmethod
    def from_plain(cls, held: Mapping[str, Any]) -> Self:
        """Back again."""
        words = ("matmul_flops", "attention_flops", "moved_bytes")
        return cls(
            moments=tuple(Amount(*moment) for moment in held["moments"]),
            inputs_per_image=held["inputs_per_image"],
            launches=held["launches"],
            **{word: tuple(held[word]) for word in words},
        )


class Meter(PeakTracker):
    """Follows bytes on the meta device and adds up work. Whatever is asked there is not so."""

    def __init__(self, images: int, rank: int | None = None) -> None:
        super().__init__(images, rank=rank, device="meta")
        self.matmul, self.attention, self.moved = [0, 0], [0, 0], [0, 0]
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ASKS and args[0].is_meta:  # such as whether a mask hides nothing
            return args[0].dtype.is_floating_point and 0.0
        if not (makes_new(func) or writes(func)):  # a view
            return func(*args, **kwargs)
        result, done = run(func, args, kwargs)
        self.add(one for one in tensors_in((result,)) if one.is_meta)
        self.launches += 1
        if done.flops:
            self._share(self.attention if done.attends else self.matmul, done.flops)
        for size in done.moved:
            self._share(self.moved, size)
        self.hold_for_a_moment(done.moment, 4)
        return result

    def _share(self, total: list[int], much: int) -> None:
        """Add what an image has of it, and what that is of each rank."""
        assert self.images is not None
        if much % self.images == 0:
            much //= self.images
        if self.rank is not None and much % self.rank == 0:
            total[1] += much // self.rank
        else:
            total[0] += much


def measure(
    step: Callable[[], object],
    *,
    held: Iterable[Tensor],
    modules: Sequence[nn.Module] = (),
    rank: int | None = None,
    kernels: Kernels = "cuda",
    attention: bool = True,
    images: int = IMAGES,
) -> Measured:
    """Run a step on the meta device and say what it needs.

    Args:
        step: of `images` images; what it keeps when it is done was there before.
        held: tensors that are there before it and stay.
        modules: that keep no more than what they are given, which is asked for.
        rank: of the adapter, where what more each rank needs is to be told apart; a large prime.
        kernels: of which kind of device the step is to be.
        attention: there is a kernel for it; else it is taken apart into products.
    """
    meter = Meter(images, rank)
    meter.add(held)
    meter.begin()
    with _inputs(meter, modules) as inputs, kernels_of(kernels, attention=attention), meter:
        step()
    return Measured(
        moments=meter.moments(),
        inputs_per_image=sum(one.per_image for one in inputs),
        matmul_flops=(meter.matmul[0], meter.matmul[1]),
        attention_flops=(meter.attention[0], meter.attention[1]),
        moved_bytes=(meter.moved[0], meter.moved[1]),
        launches=meter.launches,
    )


@contextmanager
def _inputs(meter: PeakTracker, modules: Sequence[nn.Module]) -> Iterator[list[Amount]]:
    """Bytes of what modules are given in the forward pass; each storage once."""
    known: list[Any] = []
    found: list[Amount] = []

    def look(module: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> None:
        if torch._C._current_graph_task_id() != -1:  # computed again
            return
        for one in (*args, *words.values()):
            held = meter.held(one) if isinstance(one, Tensor) else None
            if held is not None and not any(held is other for other in known):
                known.append(held)
                found.append(held.amount)

    hooks = [one.register_forward_pre_hook(look, with_kwargs=True) for one in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def measure_model(model: nn.Module, units: Sequence[Unit]) -> ModelNeed:
    """How many numbers a model's weights and buffers have, within its units and outside of them."""
    found = tuple(_unit_need(unit) for unit in units)
    inside = sum(unit.linear_numbers + unit.other_numbers for unit in found)
    return ModelNeed(found, _numbers(model) - inside)


def _unit_need(unit: Unit) -> UnitNeed:
    linears = [one for one in unit.module.modules() if isinstance(one, nn.Linear)]
    sizes = [one.in_features * one.out_features for one in linears]
    return UnitNeed(
        name=unit.name,
        linear_numbers=sum(sizes),
        other_numbers=_numbers(unit.module) - sum(sizes),
        largest_linear=max(sizes, default=0),
        linear_rows=sum(one.out_features for one in linears),
    )


def _numbers(module: nn.Module) -> int:
    return sum(one.numel() for one in (*module.parameters(), *module.buffers()))
