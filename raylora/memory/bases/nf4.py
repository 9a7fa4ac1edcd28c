"""4 bits: the sixteen numbers that halve a Gaussian best, with one scale for each 64 of them.

bitsandbytes packs and brings back, on GPUs and on the CPU; it is imported where it is used alone.

Source: Dettmers et al. 2023, arXiv 2305.14314.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from raylora.memory.bases import Base, Shape

BLOCK = 64
_NAME = "nf4"


def pack(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(O I / 2,) uint8, two numbers a byte, and (blocks,) float32 by its bits."""
    packed, largest = _operations().quantize_4bit(weight_OI, BLOCK, _NAME, torch.uint8)
    return packed.view(-1), largest.view(torch.int32)


def bring_back(packed: Tensor, scales: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """One kernel; float64 by way of float32, which is all that bitsandbytes has."""
    narrow = torch.float32 if dtype == torch.float64 else dtype
    weight: Tensor = _operations().dequantize_4bit(
        packed, scales.view(torch.float32), BLOCK, _NAME, list(shape), narrow
    )
    return weight.to(dtype)


def _operations() -> Any:
    """bitsandbytes' entries among torch's operations, which importing it makes."""
    import bitsandbytes.functional  # noqa: F401

    return torch.ops.bitsandbytes


def packed_bytes(numbers: int, rows: int) -> int:
    """Half a byte a number, and 4 a block."""
    return -(-numbers // 2) + 4 * -(-numbers // BLOCK)


def available() -> str | None:
    """Needs bitsandbytes."""
    if find_spec("bitsandbytes") is not None:
        return None
    return (
        "memory.base: nf4 needs the package bitsandbytes, which is not installed. "
        'pip install "raylora[bnb]", or choose fp8 or int8.'
    )


base = Base(pack=pack, bring_back=bring_back, packed_bytes=packed_bytes, available=available)
