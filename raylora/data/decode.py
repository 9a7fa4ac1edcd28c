"""Bytes of an image file to RGB pixels, whatever the file is, or a reason why not.

Unlike sd-scripts: EXIF orientation is obeyed, transparency is composited on a background instead of
dropped, and 16-bit grey is scaled instead of clipped to white.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from raylora.base.errors import DataError
from raylora.data.bucket import Geometry, Size

Pixels = NDArray[np.uint8]
"""(H, W, 3), red, green, blue."""

# Pillow's own warning level: a quarter of a gigabyte of RGB.
MAX_IMAGE_PIXELS = 89_478_485
WHITE = (255, 255, 255)

# All that Pillow's readers have been seen to raise on bytes made to break them.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    AttributeError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decoder_name() -> str:
    """The decoder and its version: what one refuses, another may read."""
    return f"pillow {PIL.__version__}"


def read_size(data: bytes, key: str) -> Size:
    """Width and height of an image as it is seen, from its header alone.

    Raises:
        DataError: not an image, or one too large to decode.
    """
    try:
        image = _open(data)
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)
    except _UNREADABLE as error:
        raise DataError(f"{key}: {_reason(data, error)}") from error


def decode_image(data: bytes, key: str, background: tuple[int, int, int] = WHITE) -> Pixels:
    """The pixels of an image file, upright, in 8-bit RGB, transparency on `background`.

    Raises:
        DataError: not an image, truncated or broken, or too large; with the key and the reason.
    """
    try:
        image = _open(data)
        turn = _TURNS.get(_orientation(image))
        flat = _flatten(image, background)
        return np.asarray(flat.transpose(turn) if turn is not None else flat)
    except _UNREADABLE as error:
        raise DataError(f"{key}: {_reason(data, error)}") from error


def fit_image(pixels: Pixels, geometry: Geometry, background: tuple[int, int, int]) -> Pixels:
    """Bring an image to its bucket: resize, then cut or pad.

    Shrinking averages areas, anything else is Lanczos, as in sd-scripts (which calls OpenCV's area
    filter for the first; Pillow's box filter is the same average, rounded elsewhere).
    """
    height, width = pixels.shape[:2]
    wide, high = geometry.resized
    if (width, height) != (wide, high):
        shrinks = width >= wide and height >= high
        method = Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS
        pixels = np.asarray(Image.fromarray(pixels).resize((wide, high), method))
    bucket_width, bucket_height = geometry.bucket
    (left, top), (x, y) = geometry.crop, geometry.paste
    cut = pixels[top : top + bucket_height, left : left + bucket_width]
    if cut.shape[:2] == (bucket_height, bucket_width):
        return cut
    canvas = np.full((bucket_height, bucket_width, 3), background, dtype=np.uint8)
    canvas[y : y + cut.shape[0], x : x + cut.shape[1]] = cut
    return canvas


def encoder_input(pixels: Pixels) -> NDArray[np.float32]:
    """(H, W, 3) bytes to (3, H, W) float32 in -1..1, rounded as torchvision's ToTensor does."""
    half = np.float32(0.5)
    signed = (pixels.astype(np.float32) / np.float32(255) - half) / half
    return np.ascontiguousarray(signed.transpose(2, 0, 1))


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    image = Image.open(io.BytesIO(data))
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{image.width}x{image.height} px is more than {MAX_IMAGE_PIXELS / 1e6:.0f} million "
            "pixels; shrink it"
        )
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where the EXIF block is absent or broken."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _UNREADABLE:
        return 1
    return value if value in _TURNS else 1


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    canvas = Image.new("RGBA", seen.size, (*background, 255))
    return Image.alpha_composite(canvas, seen).convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of 32 holding 16 or fractions; Pillow's own conversion clips at 255."""
    grey = np.asarray(image, dtype=np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    if not (np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= top):
        raise ValueError(f"grey values outside 0 to {top:.0f}; convert it to 8 or 16 bits")
    return Image.fromarray(np.rint(grey * (255 / top)).astype(np.uint8)).convert("RGB")


def _reason(data: bytes, error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image that can be read (begins with {data[:8]!r})"
    return str(error) or type(error).__name__
