"""What a low-rank pair does to its layer: ΔW = scale · up · down, and its norm without forming it.

Shapes: down (R, I) or (R, I, kh, kw); up (O, R) or (O, R, 1, 1). All results are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LowRank = tuple[Tensor, Tensor, float]
"""(down, up, scale)."""


def delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """ΔW in the shape of the layer's weight, (O, I) or (O, I, kh, kw), float64."""
    flat_OI = scale * (up.double().flatten(1) @ down.double().flatten(1))
    return flat_OI.reshape(up.shape[0], *down.shape[1:])


def at_scale(pair: LowRank, scale: float) -> LowRank:
    """The same ΔW with another scale, float64; what a file needs whose readers apply their own.

    Where the halves have to grow, `up` does, and where they have to shrink, `down` does: `up` is
    the smaller one after short training, and float16 has no digits to spare below 6e-5.
    """
    down, up, own = pair
    if own == scale:
        return down.double(), up.double(), scale
    factor = own / scale
    if abs(factor) < 1:
        return down.double() * factor, up.double(), scale
    return down.double(), up.double() * factor, scale


def delta_norm(pairs: Sequence[LowRank]) -> float:
    """Frobenius norm of the sum of several low-rank ΔW of one layer.

    ‖UD‖ = ‖R_U R_Dᵀ‖ for the triangular factors of U and Dᵀ, so a 10240 x 1280 ΔW of rank 16 costs
    a 16 x 16 product, and a difference of nearly equal pairs keeps float64's digits.
    """
    downs_RI = torch.cat([down.double().flatten(1) for down, _, _ in pairs])
    ups_OR = torch.cat([scale * up.double().flatten(1) for _, up, scale in pairs], dim=1)
    r_up = torch.linalg.qr(ups_OR, mode="r").R
    r_down = torch.linalg.qr(downs_RI.T, mode="r").R
    return float(torch.linalg.matrix_norm(r_up @ r_down.T))


def delta_distance(first: LowRank, second: LowRank) -> float:
    """Frobenius norm of the difference of two ΔW of one layer; their ranks may differ."""
    down, up, scale = second
    return delta_norm([first, (down, up, -scale)])
