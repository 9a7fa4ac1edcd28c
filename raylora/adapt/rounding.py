"""How far a layer's weight can move when a file rounds an adapter's numbers to its dtype.

A bound, not an estimate: a file whose weight is further off holds something else. Rounding moves a
number x by at most u·|x|, u half the spacing at 1 (2^-11 in float16, 2^-8 in bfloat16, 2^-24 in
float32), or by half the smallest subnormal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raylora.adapt import kinds
from raylora.adapt.deltas import LowRank
from raylora.adapt.lora_file import AdapterModule

_FLOAT32_UNIT = 2.0**-24
_FLOAT64_NOISE = 1e-13  # some hundred roundings of 2^-53 in the comparison itself


def low_rank_bound(trained: LowRank, dtype: torch.dtype) -> float:
    """How far ΔW can move, in Frobenius norm, when a file rounds both halves to `dtype`.

    With δD, δU of the sizes above ‖(U+δU)(D+δD) - UD‖ <= ‖U‖‖δD‖ + ‖δU‖‖D‖ + ‖δU‖‖δD‖. alpha is
    rounded to float32 besides, and the comparison to float64.
    """
    down, up, scale = trained
    unit, half_subnormal = _unit(dtype), _half_subnormal(dtype)
    down_norm, up_norm = float(down.double().norm()), float(up.double().norm())
    down_moved = unit * down_norm + half_subnormal * math.sqrt(down.numel())
    up_moved = unit * up_norm + half_subnormal * math.sqrt(up.numel())
    halves = up_norm * down_moved + up_moved * down_norm + up_moved * down_moved
    alpha = _FLOAT32_UNIT * up_norm * down_norm
    float64 = 1e-14 * up_norm * down_norm  # some 50 roundings of QR, 2^-53 each
    return abs(scale) * (halves + alpha + float64)


def merged_bound(module: AdapterModule, weight: Tensor) -> float:
    """The same for any kind of adapter, from a file's own numbers, in the weight it is merged in.

    Kinds that are sums of products move by no more than their sum of products of absolute numbers
    does when each of these grows by its rounding. Rotations (OFT) move by
    ‖R - R'‖ = 2 ‖(I - Q)⁻¹ (Q - Q') (I - Q')⁻¹‖ <= 2 ‖Q - Q'‖, Q being skew-symmetric.
    """
    held = {word: tensor.double() for word, tensor in module.tensors.items()}
    moved = {word: _moved(module.tensors[word]) for word in held}
    noise = _FLOAT64_NOISE * float(weight.norm())
    if module.kind in ("oft", "boft"):
        return noise + _rotation_bound(held, moved, weight)
    plain = {word: tensor for word, tensor in held.items() if word != kinds.DORA}
    sized = {word: tensor.abs() for word, tensor in plain.items()}
    grown = {word: tensor.abs() + moved[word] for word, tensor in plain.items()}
    if "on_input" in plain:
        grown["on_input"] = plain["on_input"]
    before, after = (kinds.change(one, weight.abs())["weight"] for one in (sized, grown))
    moved_weight = (after - before).reshape(weight.shape)
    noise += _FLOAT64_NOISE * float(after.norm())
    if kinds.DORA not in held:
        return noise + float(moved_weight.norm())
    changed = weight + kinds.change(plain)["weight"].reshape(weight.shape)
    return noise + _magnitude_bound(changed, moved_weight, held[kinds.DORA], moved[kinds.DORA])


def _magnitude_bound(changed: Tensor, moved: Tensor, magnitude: Tensor, rounded: Tensor) -> float:
    """m·V/‖V‖ moves by δm, and by 2 m ‖δV‖/‖V‖ at most."""
    # Ones in place of the magnitude give V/‖V‖, so that rows and columns are told apart once.
    directions = kinds.decomposed(changed, torch.ones_like(magnitude))
    own = float(kinds.decomposed(changed, rounded).norm())
    sizes = kinds.decomposed(changed, magnitude.abs()).abs() / changed.abs().clamp_min(1e-300)
    return own + 2 * float((sizes * moved).norm()) + _FLOAT64_NOISE * float(directions.norm())


def _rotation_bound(held: dict[str, Tensor], moved: dict[str, Tensor], weight: Tensor) -> float:
    """Q is a block minus its transpose, so it moves by twice what the block does.

    A limit of the norm scales all of Q down, and moves with Q's norm: by twice as much again, times
    how much smaller it makes Q.
    """
    blocks, shifts = held["oft_blocks"], moved["oft_blocks"]
    norm = float((blocks - blocks.mT).norm())
    limit = float(held[kinds.ALPHA]) * len(weight) if kinds.ALPHA in held else 0.0
    smaller = 2 * min(1.0, limit / norm) if limit and norm else 1.0
    stages = shifts if blocks.dim() == 4 else shifts[None]
    turned = sum(4 * smaller * float(stage.norm()) for stage in stages)
    turned += len(stages) * _FLOAT32_UNIT
    size = float(weight.norm())
    rescale = held.get("rescale")
    if rescale is None:
        return turned * size
    return (turned * float(rescale.abs().max()) + float(moved["rescale"].max())) * size


def _moved(tensor: Tensor) -> Tensor:
    """What rounding to its own dtype, and to float32 before, can have moved each number by."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=torch.float64)
    unit = _unit(tensor.dtype) * (1 + 2 * _unit(tensor.dtype)) + 2 * _FLOAT32_UNIT
    return tensor.double().abs() * unit + _half_subnormal(tensor.dtype)


def _unit(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps) / 2


def _half_subnormal(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return float(info.smallest_normal) * float(info.eps) / 2
