"""Frozen linears held in fewer bits: the contract of a way to hold them, and the layer itself.

The weight is brought back in the arithmetic's dtype for each product, forward and backward, and let
go of again, so that what lies there all the time is the packed form alone. A file
`bases/<kind>.py` defines

    base = Base(pack=..., bring_back=..., packed_bytes=...)

and its name is the word in the YAML (`memory.base`); `full`, which holds nothing in fewer bits, has
no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylora.base.lookup import load_plugin
from raylora.base.unit import Unit
from raylora.memory.need import UnitNeed
from raylora.memory.setting import BaseKind

Shape = Sequence[int]
"""(outputs, inputs) of a weight."""


def _always() -> str | None:
    return None


@dataclass(frozen=True)
class Base:
    """One way to hold a linear's weight.

    Attributes:
        pack: (O, I) float32, which it may use up -> (packed, scales). Both are of whole numbers,
            scales by their bits, since `module.to(dtype)` and `module.half()` cast every float.
        bring_back: (packed, scales, (O, I), dtype) -> the weight, rounded to dtype once.
        packed_bytes: (numbers, rows) -> bytes of both. Of several layers together it is exact where
            each is a whole number of blocks, as those of all true models are.
        available: why it cannot be used here, as a sentence; None where it can.
    """

    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    bring_back: Callable[[Tensor, Tensor, Shape, torch.dtype], Tensor]
    packed_bytes: Callable[[int, int], int]
    available: Callable[[], str | None] = _always

    def bytes_of(self, rows: int, columns: int) -> int:
        """What one weight takes, scales included; the bias is not held in fewer bits."""
        return self.packed_bytes(rows * columns, rows)

    def make(self, layer: nn.Linear, device: torch.device) -> HeldLinear:
        """The layer with its weight packed, on the device where that is done; also on meta."""
        return HeldLinear(layer, self, device)


class HeldLinear(nn.Linear):
    """A frozen linear in fewer bits. It is an `nn.Linear` to whoever looks for those.

    Attributes:
        packed, scales: buffers, so that whatever moves or streams a model's weights moves these.
        base: how they are read.
        dtype: of `weight`; follows `module.to(dtype)`, as the bias does.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear, base: Base, device: torch.device) -> None:
        # Not nn.Linear's own: that would make a weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.base, self.dtype = base, layer.weight.dtype
        self.train(layer.training)
        # First to the device, then to float32: half of what a cast on the host would send.
        weight = layer.weight.detach().to(device).to(torch.float32, copy=True)
        packed, scales = base.pack(weight)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        bias = layer.bias
        moved = None if bias is None else nn.Parameter(bias.detach().to(device), False)
        self.register_parameter("bias", moved)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(O, I) brought back, for networks that read it; a copy, made on each reading."""
        return self.base.bring_back(self.packed, self.scales, self._shape, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, in the input's dtype."""
        held = self.packed, self.scales, self.bias, self.base, self._shape
        y: Tensor = _Product.apply(input, *held)  # type: ignore[no-untyped-call]
        return y

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeldLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        return self


class _Product(torch.autograd.Function):
    """x Wᵀ + bias that keeps the packed weight alone: a frozen one has no gradient, so x is not
    needed again, and W is brought back a second time for the gradient of x."""

    @staticmethod
    def forward(
        x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, base: Base, shape: Shape
    ) -> Tensor:
        return F.linear(x, base.bring_back(packed, scales, shape, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, packed, scales, _, ctx.base, ctx.shape = inputs
        ctx.save_for_backward(packed, scales)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        packed, scales = ctx.saved_tensors
        of_x = grad @ ctx.base.bring_back(packed, scales, ctx.shape, grad.dtype)
        return of_x, None, None, None, None, None


@cache
def get_base(kind: BaseKind) -> Base:
    """The way of that name; OptionError lists the known ones."""
    found = load_plugin(__name__, kind).base
    assert isinstance(found, Base)
    return found


def base_problem(kind: BaseKind) -> str | None:
    """Why frozen linears cannot be held so in this installation, as a sentence; None: they can."""
    return None if kind == "full" else get_base(kind).available()


def hold_linears(unit: Unit, kind: BaseKind, device: torch.device) -> None:
    """Hold every linear of a unit so, one at a time, packed on the device and left there.

    The layers stay the same objects, so that whoever knows one by reference still does. Must be
    done before an adapter is attached, whose route through the layer would be lost.
    """
    if kind == "full":
        return
    base = get_base(kind)
    for layer in unit.module.modules():
        if type(layer) is nn.Linear:
            assert "forward" not in vars(layer), f"{unit.name} carries an adapter already"
            _become(layer, base.make(layer, device))


def _become(layer: nn.Linear, held: HeldLinear) -> None:
    layer.__class__ = HeldLinear
    vars(layer).clear()
    vars(layer).update(vars(held))


def bytes_of_unit(unit: UnitNeed, kind: BaseKind, bytes_a_number: int) -> int:
    """Bytes of a unit's weights with its linears held so, and the rest in the arithmetic's."""
    rest = unit.other_numbers * bytes_a_number
    if kind == "full":
        return rest + unit.linear_numbers * bytes_a_number
    return rest + get_base(kind).packed_bytes(unit.linear_numbers, unit.linear_rows)
