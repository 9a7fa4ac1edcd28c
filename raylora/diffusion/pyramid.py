"""Noise with something in it at every size: the sum of fields drawn small and made large.

numpy's elementwise float64 alone, so that every machine gets the same bits; torch's own
interpolation differs between kinds of CPU.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from raylora.base.seeds import uniforms


def pyramid_noise(
    noise: NDArray[np.float32],
    generator: np.random.Generator,
    *,
    iterations: int,
    discount: float,
) -> NDArray[np.float32]:
    """One sample's noise with smaller fields added, and brought back to a deviation of 1.

    Field i is drawn at 1 / r^i of the size, r uniform in [2, 4) for each field, is made as large
    as the noise and counts discount^i. The first, i = 0, has full size. A field that is one number
    high or wide is the last.

    Args:
        noise: (C, H, W) standard normal.
        generator: the sample's own, for the ratios and the fields.
        iterations: how many fields at most.
        discount: how fast coarser fields fade.

    Source: Whitaker 2023, "Multi-resolution noise for diffusion model training", as in sd-scripts.
    """
    channels, height, width = noise.shape
    total = noise.astype(np.float64)
    ratios = (2.0 + 2.0 * uniforms(generator, iterations)).tolist()
    for i, ratio in enumerate(ratios):
        # Products, not powers, of which C libraries round the last bit as they please.
        shrunk = math.prod([ratio] * i)
        high, wide = max(1, int(height / shrunk)), max(1, int(width / shrunk))
        field = generator.standard_normal((channels, high, wide), dtype=np.float32)
        total += enlarged(field, height, width) * math.prod([discount] * i)
        if high == 1 or wide == 1:
            break
    spread = np.square(total - total.mean()).sum() / max(1, total.size - 1)
    found: NDArray[np.float32] = (total / np.sqrt(spread)).astype(np.float32)
    return found


def enlarged(field: NDArray[np.floating], height: int, width: int) -> NDArray[np.float64]:
    """Bilinear interpolation of (C, h, w) to (C, height, width), corners not aligned.

    Pixels are squares: the middle of the first one stays half a pixel from the edge, and what lies
    beyond the outermost middles repeats them.
    """
    rows = _along(field.astype(np.float64), height, axis=1)
    return _along(rows, width, axis=2)


def _along(field: NDArray[np.float64], count: int, *, axis: int) -> NDArray[np.float64]:
    own = field.shape[axis]
    places = np.maximum((np.arange(count) + 0.5) * (own / count) - 0.5, 0.0)
    before = places.astype(np.int64)
    after = np.minimum(before + 1, own - 1)
    share = (places - before).reshape([-1 if i == axis else 1 for i in range(field.ndim)])
    left, right = field.take(before, axis), field.take(after, axis)
    found: NDArray[np.float64] = left * (1.0 - share) + right * share
    return found
