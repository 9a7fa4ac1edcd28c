"""How one showing of an image differs from another: cut, flip and colour, drawn by its own key."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from raylora.base.options import Options
from raylora.base.seeds import uniforms
from raylora.data.pixels.bucket import Geometry, Interpolation, Size
from raylora.data.pixels.decode import Pixels, fit_image

if TYPE_CHECKING:
    from raylora.data.options import SetOptions

Positive = Annotated[float, Field(gt=0)]


class AugmentWords(Options):
    """Changes of the picture that are drawn for each variant of an image."""

    flip_aug: bool = False
    """Mirror half of the variants left to right; not for text, logos or one-sided characters."""
    color_aug: bool = False
    """Shift the hue (8 degrees of 180 at most) or the gamma (0.95 to 1.05) of one variant in
    three."""
    random_crop: bool = False
    """Cut the bucket out at a random place instead of the middle."""
    face_crop_aug_range: tuple[Positive, Positive] | None = None
    """[lowest, highest] enlargement around the face, for images named `name_cx_cy_w_h` (the face's
    centre and size in pixels): the bucket's shorter side is between `lowest` and `highest` times
    the face."""


# Numbers of sd-scripts.
_COLOURED = 0.33
_MOST_HUE = 8.0
_GAMMAS = (0.95, 1.05)
_FACE_JITTER = 20
"""The crop lies off the face's centre by one part in so many of the face, at most."""

_FACE = re.compile(r"_([0-9]{1,6})" * 4 + r"\Z")


@dataclass(frozen=True, slots=True)
class Look:
    """How one showing of an image looks: all that was drawn, so that it can be done again."""

    geometry: Geometry
    flip: bool = False
    """Mirrored left to right, after all else."""
    hue: float = 0.0
    """Shift in degrees of OpenCV's scale, on which 180 is the whole circle."""
    gamma: float = 1.0
    """Power of the values, where white is 1; above 1 is darker."""


@dataclass(frozen=True, slots=True)
class _Face:
    centre: tuple[int, int]
    side: int
    """The larger one."""


def draw_look(
    size: Size,
    key: str,
    options: SetOptions,
    generator: np.random.Generator | None,
    *,
    mirror: bool = False,
) -> Look:
    """Draw how an image is cut and coloured; every draw has its place, whatever is switched on.

    Args:
        size: of the image, upright.
        key: its name, which may end in the place of a face.
        generator: None draws nothing: the crop lies in the middle.
        mirror: whether this showing is mirrored; the caller balances both ways.

    Raises:
        DataError: no bucket can hold it; the message is the reason, without a file name.
    """
    geometry = options.buckets.place(size, options.fit)
    if generator is None:
        return Look(geometry, flip=mirror)
    scale, *shifts, chance, amount = uniforms(generator, 7).tolist()
    draws = iter(shifts)
    face = _face_of(key) if options.face_crop_aug_range else None
    if options.fit == "crop" and face and options.face_crop_aug_range:
        geometry = _around_face(geometry, size, face, options, scale, draws)
    elif options.fit == "crop" and options.random_crop:
        pairs = zip(geometry.resized, geometry.bucket, strict=True)
        left, top = (_whole(next(draws), whole - part) for whole, part in pairs)
        geometry = replace(geometry, crop=(left, top))
    if not options.color_aug or chance >= _COLOURED:
        return Look(geometry, flip=mirror)
    if chance < _COLOURED / 2:
        return Look(geometry, flip=mirror, hue=_MOST_HUE * (2 * amount - 1))
    low, high = _GAMMAS
    return Look(geometry, flip=mirror, gamma=low + (high - low) * amount)


def apply_look(
    pixels: Pixels,
    look: Look,
    background: tuple[int, int, int],
    interpolation: Interpolation | None = None,
) -> Pixels:
    """Show an image as a look has it: resize, cut or pad, colour, mirror.

    Args:
        pixels: the image, upright, or a reduced decoding of it (`decode_image`).
    """
    shown = fit_image(pixels, look.geometry, background, interpolation)
    if look.hue:
        shown = _shift_hue(shown, look.hue)
    if look.gamma != 1:
        shown = _gamma_table(look.gamma)[shown]
    return np.ascontiguousarray(shown[:, ::-1]) if look.flip else shown


def true_crop(look: Look) -> tuple[int, int]:
    """Left and top of the cut in the resized image, mirrored where the look is: SDXL's condition.

    (0, 0) where the image is padded.
    """
    left, top = look.geometry.crop
    if look.flip:
        left = max(0, look.geometry.resized[0] - look.geometry.bucket[0] - left)
    return left, top


def _face_of(key: str) -> _Face | None:
    found = _FACE.search(PurePosixPath(key).stem)
    if found is None:
        return None
    x, y, width, height = map(int, found.groups())
    return _Face((x, y), max(width, height)) if width and height else None


def _around_face(
    geometry: Geometry,
    size: Size,
    face: _Face,
    options: SetOptions,
    scale: float,
    draws: Iterator[float],
) -> Geometry:
    """Resize so that the face takes its share of the bucket, and cut around it.

    The scale is drawn evenly from what the range allows, but the bucket is always covered, and
    nothing is enlarged unless covering it needs that.
    """
    assert options.face_crop_aug_range
    lowest, highest = options.face_crop_aug_range
    bucket = geometry.bucket
    cover = max(part / whole for part, whole in zip(bucket, size, strict=True))
    most = max(1.0, cover)
    low, high = (
        min(most, max(cover, min(bucket) / (face.side * times))) for times in (highest, lowest)
    )
    chosen = low + (high - low) * scale
    resized = tuple(
        max(part, int(whole * chosen + 0.5)) for part, whole in zip(bucket, size, strict=True)
    )
    jitter = int(face.side * chosen / _FACE_JITTER) if lowest != highest else 0
    crop = []
    for place, whole, part in zip(face.centre, resized, bucket, strict=True):
        centre = min(whole, int(place * chosen + 0.5))
        first, second = next(draws), next(draws)
        if options.random_crop:
            reach = max(centre, whole - centre)
            shift = _whole(first, reach) + _whole(second, reach) - reach
        else:
            shift = _whole(first, 2 * jitter) - jitter
        crop.append(max(0, min(centre - part // 2 + shift, whole - part)))
    return Geometry(bucket, (resized[0], resized[1]), (crop[0], crop[1]), (0, 0))


def _whole(drawn: float, most: int) -> int:
    """0 … most, each as likely, of a number in [0, 1)."""
    return math.floor(drawn * (most + 1))


def _shift_hue(pixels: Pixels, degrees: float) -> Pixels:
    """Turn the hue in HSV, leaving value and saturation; in float32, so that no hue is rounded."""
    rgb = pixels.astype(np.float32)
    value = rgb.max(axis=2)
    chroma = value - rgb.min(axis=2)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    safe = np.where(chroma == 0, np.float32(1), chroma)
    hue = np.where(  # in sixths of the circle
        value == red,
        (green - blue) / safe,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue += np.float32(degrees / 30)
    shown = np.empty_like(rgb)
    for channel, offset in enumerate((5, 3, 1)):
        place = (hue + np.float32(offset)) % 6
        share = np.clip(np.minimum(place, 4 - place), 0, 1)
        shown[..., channel] = value - chroma * share
    return np.rint(shown).astype(np.uint8)


def _gamma_table(gamma: float) -> Pixels:
    """What each of 256 values becomes."""
    return np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
