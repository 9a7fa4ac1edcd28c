"""Which part of a picture the loss looks at: its alpha channel, or a picture of the same name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raylora.base.errors import DataError
from raylora.base.options import Options
from raylora.data.pixels.bucket import Size
from raylora.data.pixels.decode import fit_image

if TYPE_CHECKING:
    from raylora.data.pixels.augment import Look

Mask = NDArray[np.uint8]
"""(H, W): 255 counts whole, 0 not at all."""


class MaskWords(Options):
    """Where masks come from; without one, all of the picture counts."""

    alpha_mask: bool = False
    """The image's own alpha channel: what is transparent does not count."""
    mask_folder: str | None = None
    """Pictures of the same names, anywhere: white counts, black does not. The red channel is
    read."""


def fit_mask(mask: Mask, look: Look, *, picture: Size | None = None) -> Mask:
    """Bring a mask to the bucket the way its picture goes: resize, cut or pad, mirror.

    Shrinking averages areas and anything else is bilinear, so that no value lies outside those of
    the mask. Padding counts 0.

    Args:
        mask: upright, of any size that has the picture's shape.
        picture: width and height of the picture, upright, which the mask's shape is held against;
            without it, the resized picture's, which is the same but for rounding.

    Raises:
        DataError: the mask has another shape than the picture; names both sizes.
    """
    size = (mask.shape[1], mask.shape[0])
    wide, high = look.geometry.resized
    if picture:
        check_shape(size, picture)
    elif not _same_shape(size, (wide, high), is_rounded=True):
        raise DataError(_wrong_shape(size, f"picture, {wide}x{high} px when resized"))
    shrinks = size[0] >= wide and size[1] >= high
    fitted = fit_image(mask, look.geometry, (0,), "area" if shrinks else "bilinear")
    return np.ascontiguousarray(fitted[:, ::-1]) if look.flip else fitted


def check_shape(mask: Size, picture: Size) -> None:
    """Refuse a mask that is not its picture's shape, of whatever size.

    Raises:
        DataError: names both sizes.
    """
    if not _same_shape(mask, picture, is_rounded=False):
        raise DataError(_wrong_shape(mask, f"picture of {picture[0]}x{picture[1]} px"))


def latent_mask(mask: Mask, cells: tuple[int, int]) -> NDArray[np.float32]:
    """How much each latent cell counts: the mask's average over it, 0 to 1.

    Args:
        mask: (H, W) of the bucket.
        cells: rows and columns of the latents, H and W divided by the VAE's factor.

    Returns:
        (1, rows, columns).
    """
    (high, wide), (rows, columns) = mask.shape, cells
    assert high % rows == 0, (mask.shape, cells)
    assert wide % columns == 0, (mask.shape, cells)
    blocks = mask.reshape(rows, high // rows, columns, wide // columns)
    # Whole numbers, so that the average is the same on every machine.
    sums = blocks.sum(axis=(1, 3), dtype=np.int64)
    most = 255 * (high // rows) * (wide // columns)
    shares: NDArray[np.float32] = (sums / most).astype(np.float32)
    return shares[None]


def _wrong_shape(mask: Size, picture: str) -> str:
    return (
        f"a mask of {mask[0]}x{mask[1]} px does not fit a {picture}; make it the picture's size, "
        "or the same shape smaller or larger"
    )


def _same_shape(mask: Size, picture: Size, *, is_rounded: bool) -> bool:
    """Whether one is the other, resized, each side of the mask off by a pixel at most."""
    slack = sum(picture) + (sum(mask) / 2 if is_rounded else 0)
    return abs(mask[0] * picture[1] - mask[1] * picture[0]) <= slack
