"""Which shape an image is trained in, and how it gets there, counted as sd-scripts counts.

The bucket set, the choice of a bucket, the resized size and the centre crop are those of
`library/model_util.py` and `BucketManager` of sd-scripts, so that a data set prepared there trains
on the same pixels here. Ours on purpose: `fit: pad`, a cover-resize where bucketing is off (there:
an assertion), and an error instead of a bucket of size zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from raylora.base.errors import DataError, OptionError
from raylora.base.options import Options

Size = tuple[int, int]
"""Width and height in pixels."""
Fit = Literal["crop", "pad"]
Interpolation = Literal[
    "lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"
]

# The VAEs of all families shrink by 8 or less, a power of two.
PIXEL_STEP = 8


class BucketWords(Options):
    """Which shape an image is trained in."""

    resolution: int | tuple[int, int] | None = None
    """Side of the square, or [width, height], in pixels. With buckets: the area none exceeds. Null
    is the size that the family was made for: 512 for Stable Diffusion 1.5."""
    enable_bucket: bool = True
    """Train each image near its own shape; off, every image is brought to `resolution`."""
    min_bucket_reso: int | None = Field(None, ge=PIXEL_STEP)
    """Shortest side of a bucket in pixels; null is half of `resolution`'s shorter side, at most
    256."""
    max_bucket_reso: int | None = Field(None, ge=PIXEL_STEP)
    """Longest side of a bucket in pixels; null is twice `resolution`'s longer side, which clips no
    usual shape."""
    bucket_reso_steps: int | None = Field(None, ge=PIXEL_STEP, multiple_of=PIXEL_STEP)
    """Sides of buckets are multiples of this many pixels; null is what suits the family: 64 for
    Stable Diffusion 1.5."""
    bucket_no_upscale: bool = False
    """Never enlarge an image; buckets are then made from the images' own sizes."""
    fit: Literal["crop", "pad"] = "crop"
    """`crop` fills the bucket and cuts what sticks out, evenly; `pad` shows all of the image and
    fills the rest with `background`, which suits icons and cut-outs."""
    background: str = Field("#ffffff", pattern=r"^#[0-9a-fA-F]{6}$")
    """Colour behind transparent pixels and around padded images, as #rrggbb."""
    resize_interpolation: Interpolation | None = None
    """How images are resized; null averages areas where both sides shrink, else Lanczos."""


# An image is resized whole and then cropped, so a thin strip could ask for gigabytes.
MAX_RESIZED_PIXELS = 178_956_970


@dataclass(frozen=True, slots=True)
class Geometry:
    """The road of one image to its bucket: resize, cut at `crop`, put down at `paste`."""

    bucket: Size
    resized: Size
    crop: Size
    """Left and top of the cut, in the resized image; (0, 0) when padding."""
    paste: Size
    """Left and top of the image on the bucket's canvas; (0, 0) when cropping."""


class Buckets:
    """The shapes a data set is trained in; `place` finds the one an image goes to.

    Args:
        resolution: width and height whose area no bucket exceeds.
        enabled: off means that every image is brought to `resolution`.
        minimum, maximum: shortest and longest side of a bucket; rounded to `step` outwards.
        step: sides are multiples of it.
        no_upscale: images keep their size unless their area exceeds that of `resolution`; then the
            set is open and `minimum` and `maximum` are not looked at. As in sd-scripts, a bucket of
            a thin image may then exceed the area by what rounding a side to a pixel adds.

    Raises:
        OptionError: `resolution` does not lie between `minimum` and `maximum`.
    """

    def __init__(
        self,
        resolution: Size,
        *,
        enabled: bool = True,
        minimum: int = 256,
        maximum: int = 1024,
        step: int = 64,
        no_upscale: bool = False,
    ) -> None:
        self.resolution = resolution
        self.step = step
        self.no_upscale = no_upscale and enabled
        self.sizes: list[Size] = [resolution]
        if enabled and not no_upscale:
            low, high = max(step, minimum - minimum % step), maximum + -maximum % step
            check_range(resolution, low, high)
            self.sizes = bucket_sizes(resolution, low, high, step)
        self._known = frozenset(self.sizes)
        self._ratios = np.array([width / height for width, height in self.sizes])

    def place(self, size: Size, fit: Fit = "crop") -> Geometry:
        """The bucket of an image of `size`, and the resize, crop or padding that brings it there.

        Raises:
            DataError: no bucket can hold it; the message is the reason, without a file name.
        """
        bucket, resized = self._shrink(size) if self.no_upscale else self._cover(size)
        if not all(bucket):
            raise DataError(
                f"{size[0]}x{size[1]} px is smaller than one step of {self.step} px, and "
                "data.bucket_no_upscale forbids enlarging it"
            )
        if fit == "pad":
            resized = _contained(size, bucket, enlarge=not self.no_upscale)
            paste = ((bucket[0] - resized[0]) // 2, (bucket[1] - resized[1]) // 2)
            return Geometry(bucket, resized, (0, 0), paste)
        if resized[0] * resized[1] > MAX_RESIZED_PIXELS:
            raise DataError(f"{size[0]}x{size[1]} px is too long and thin to be cropped")
        crop = ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)
        return Geometry(bucket, resized, crop, (0, 0))

    def _cover(self, size: Size) -> tuple[Size, Size]:
        width, height = size
        ratio = width / height
        bucket = size
        if size not in self._known:
            bucket = self.sizes[int(np.abs(self._ratios - ratio).argmin())]
        wide = ratio > bucket[0] / bucket[1]
        scale = bucket[1] / height if wide else bucket[0] / width
        return bucket, (int(width * scale + 0.5), int(height * scale + 0.5))

    def _shrink(self, size: Size) -> tuple[Size, Size]:
        resized = size
        if size[0] * size[1] > self.resolution[0] * self.resolution[1]:
            resized = self._shrunk(size[0] / size[1])
        return (self._floor(resized[0]), self._floor(resized[1])), resized

    def _shrunk(self, ratio: float) -> Size:
        """Bring one side to a multiple of the step: the one that distorts the ratio less."""
        area = self.resolution[0] * self.resolution[1]
        width = self._round(math.sqrt(area * ratio))
        height = self._round(area / math.sqrt(area * ratio))
        other_height, other_width = self._round(width / ratio), self._round(height * ratio)
        if not (other_height and height):  # sd-scripts divides by zero here
            return 0, 0
        if abs(width / other_height - ratio) < abs(other_width / height - ratio):
            return width, int(width / ratio + 0.5)
        return int(height * ratio + 0.5), height

    def _floor(self, pixels: int) -> int:
        return pixels - pixels % self.step

    def _round(self, pixels: float) -> int:
        return self._floor(int(pixels + 0.5))


def check_range(resolution: Size, minimum: int, maximum: int) -> None:
    """Refuse a resolution that lies outside the allowed sides of a bucket.

    Raises:
        OptionError: names the option to change and its nearest value that works.
    """
    if maximum < max(resolution):
        raise OptionError(
            f"max_bucket_reso {maximum} is smaller than a side of resolution "
            f"{resolution[0]}x{resolution[1]}. Raise it to {max(resolution)}, or lower resolution."
        )
    if minimum > min(resolution):
        raise OptionError(
            f"min_bucket_reso {minimum} is larger than a side of resolution "
            f"{resolution[0]}x{resolution[1]}. Lower it to {min(resolution)}, raise resolution, "
            "or set enable_bucket: false."
        )


def bucket_sizes(resolution: Size, minimum: int, maximum: int, step: int) -> list[Size]:
    """Every shape with sides in minimum..maximum whose area stays within that of `resolution`.

    Source: `make_bucket_resolutions` in sd-scripts' library/model_util.py.
    """
    area = resolution[0] * resolution[1]
    square = int(math.sqrt(area) // step) * step
    sizes = {(square, square)} if square else set()
    for width in range(minimum, maximum + 1, step):
        height = min(maximum, area // width // step * step)
        if height >= minimum:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def sd_scripts_crop(bucket: Size, size: Size) -> tuple[float, float, float, float]:
    """The SDXL crop condition (left, top, right, bottom) that sd-scripts would feed.

    It belongs to a contain-resize although the pixels are cover-resized, so it lies on the other
    axis than the true crop; `Geometry.crop` is the true one. Kept to reproduce runs of sd-scripts.
    """
    ratio = size[0] / size[1]
    width, height = float(bucket[0]), float(bucket[1])
    if bucket[0] / bucket[1] > ratio:
        width = height * ratio
    else:
        height = width / ratio
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def _contained(size: Size, bucket: Size, *, enlarge: bool) -> Size:
    scale = min(bucket[0] / size[0], bucket[1] / size[1])
    if not enlarge:
        scale = min(scale, 1.0)
    width, height = (max(1, int(side * scale + 0.5)) for side in size)
    return min(width, bucket[0]), min(height, bucket[1])
