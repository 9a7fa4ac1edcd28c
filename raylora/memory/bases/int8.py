"""8-bit whole numbers, symmetric about zero, with one scale for each output's row.

A row of some thousand Gaussian weights reaches about 3.5 of its standard deviations, so that a step
is 1/36 of one, and rounding to the nearest an error of 1/√12 of that: 0.8 % of the weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raylora.memory.bases import Base, Shape

_LARGEST = 127  # -128 is left out, so that both signs reach equally far


def pack(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) int8, and (O,) float32 by its bits."""
    # By a tensor: a GPU multiplies by a number's reciprocal, which is not always as round.
    largest = torch.full((), _LARGEST, dtype=torch.float32, device=weight_OI.device)
    scales_O = torch.linalg.vector_norm(weight_OI, ord=math.inf, dim=1) / largest
    scales_O = torch.where(scales_O == 0, 1.0, scales_O)
    packed = weight_OI.div_(scales_O[:, None]).round_().to(torch.int8)
    return packed, scales_O.view(torch.int32)


def bring_back(packed: Tensor, scales: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """One kernel on a GPU: multiplied in float32, and rounded as it is written."""
    weight = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    return torch.mul(packed, scales.view(torch.float32)[:, None], out=weight)


def packed_bytes(numbers: int, rows: int) -> int:
    """A byte a number, and 4 a row."""
    return numbers + 4 * rows


base = Base(pack=pack, bring_back=bring_back, packed_bytes=packed_bytes)
