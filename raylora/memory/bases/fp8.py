"""8-bit floats, e4m3, with one scale for each 128 numbers in the order of the rows.

Three bits of mantissa make an error of about 2.6 % of a weight, whatever its size, as long as it is
above 2⁻¹⁵ of the largest of its block. So blocks guard against single large weights alone, and
along the rows a block is a plain view of the weight, of whatever shape, and one multiplication
brings all back. A scale is a power of two: nothing but the eight bits is rounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raylora.memory.bases import Base, Shape

BLOCK = 128
_LARGEST = 448.0  # of e4m3
_E4M3 = torch.float8_e4m3fn


def pack(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) uint8 and (blocks,) int16, the bits of e4m3 and of bfloat16."""
    parts = _in_blocks(weight_OI)
    largest = torch.cat([torch.linalg.vector_norm(p, ord=math.inf, dim=1) for p in parts])
    _, exponents = torch.frexp(largest / _LARGEST)
    # The bits of 2^exponent; torch's own powers of two are not exact on every device.
    scales = ((exponents.clamp(-126, 127) + 127) << 7).to(torch.int16)
    for part, own in zip(parts, _of_parts(scales, parts), strict=True):
        part.div_(own)
    return weight_OI.to(_E4M3).view(torch.uint8), scales


def bring_back(packed: Tensor, scales: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Two kernels: the bits to dtype, in which all of them can be written, and the product."""
    weight_OI = packed.view(_E4M3).to(dtype)
    parts = _in_blocks(weight_OI)
    for part, own in zip(parts, _of_parts(scales, parts), strict=True):
        part.mul_(own)
    return weight_OI


def _in_blocks(weight_OI: Tensor) -> list[Tensor]:
    """Views of it, a block a row: the whole blocks, and what is left over where there is some."""
    flat = weight_OI.view(-1)
    whole = flat.numel() // BLOCK * BLOCK
    parts = flat[:whole].view(-1, BLOCK), flat[whole:].view(1, -1)
    return [part for part in parts if part.numel()]


def _of_parts(scales: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """Each part's scales, (blocks, 1)."""
    return list(torch.split(scales.view(torch.bfloat16)[:, None], [len(part) for part in parts]))


def packed_bytes(numbers: int, rows: int) -> int:
    """A byte a number, and 2 a block."""
    return numbers + 2 * -(-numbers // BLOCK)


base = Base(pack=pack, bring_back=bring_back, packed_bytes=packed_bytes)
