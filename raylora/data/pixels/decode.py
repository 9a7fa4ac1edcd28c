"""Bytes of an image file to RGB pixels, whatever the file is, or a reason why not.

Unlike sd-scripts: EXIF orientation and embedded colour profiles are obeyed, transparency is
composited on a background instead of dropped, 16-bit grey is scaled instead of clipped to white.
"""

from __future__ import annotations

import importlib
import io
import re
import struct
import warnings
import zlib
from contextlib import suppress
from functools import cache

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError, features

from raylora.base.errors import DataError
from raylora.data.pixels.bucket import Geometry, Interpolation, Size

Pixels = NDArray[np.uint8]
"""(H, W, 3), red, green, blue."""

# Pillow's own warning level: a quarter of a gigabyte of RGB.
MAX_IMAGE_PIXELS = 89_478_485
# That of JPEG. Pillow's raw decoder takes time by the square of a row's length.
MAX_SIDE = 65_535
WHITE = (255, 255, 255)
_BLACK = (0, 0, 0)

# Nothing else is opened: some of Pillow's other readers start programs (EPS) or read slowly.
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF", "GIF", "TIFF", "JXL")
# Progressive JPEGs have 10 scans or so. Each costs a walk over the whole image, in a few bytes.
_MAX_JPEG_SCANS = 200
_JXL_BEGINNINGS = (b"\xff\x0a", b"\0\0\0\x0cJXL ")

# All that Pillow's readers have been seen to raise on bytes made to break them.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    ImageCms.PyCMSError,
)
# What Pillow warns of either does no harm to the pixels or comes as an error as well.
warnings.filterwarnings("ignore", module=r"PIL\.")

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
_FILTERS: dict[Interpolation, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "box": Image.Resampling.BOX,
}
# Files that end up under an image's name; the first that fits the beginning gives the reason.
_OTHER_KINDS = {
    rb"\xff\x0a|\0\0\0\x0cJXL ": "a JPEG XL image; pip install raylora[jxl] to read it",
    rb".{4}ftyp(hei|hev|mif1|msf1)": "a HEIC image; convert it to PNG, JPEG or WebP",
    rb".{4}ftypavi": "an AVIF image that this Pillow cannot read; convert it to PNG or WebP",
    rb"8BPS": "a Photoshop document; export it as PNG",
    rb"%!PS": "a PostScript document; export it as PNG",
    rb"%PDF": "a PDF document; export its pages as PNG",
    rb"PK\x03\x04": "a ZIP archive; unpack it",
    rb"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
    rb"(?is)(\xef\xbb\xbf)?\s*<.{0,2000}?<?svg\b": "an SVG drawing; export it as PNG",
    rb"(?is)(\xef\xbb\xbf)?\s*(<!--.{0,500}?-->\s*)?<(!doctype html|html|head|body)": (
        "a web page; the download failed"
    ),
    rb"[\t\n\r -~]+\Z": "text",
    rb"\x89PNG": "a PNG image with a broken header",
    rb"\xff\xd8": "a JPEG image with a broken header",
    rb"RIFF....WEBP": "a WebP image with a broken header",
}


@cache
def image_suffixes() -> frozenset[str]:
    """Endings of file names, in small letters, whose images can be read with what is installed."""
    found = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    if "avif" in features.modules and features.check("avif"):  # part of Pillow from 11.3 on
        found.add(".avif")
    if "JXL" in _formats():
        found.add(".jxl")
    return frozenset(found)


def decoder_name() -> str:
    """The decoder and its version: what one refuses, another may read."""
    return f"pillow {PIL.__version__}" + (" with jxl" if "JXL" in _formats() else "")


def read_size(data: bytes, key: str) -> Size:
    """Width and height of an image as it is seen, from its header alone.

    Raises:
        DataError: not an image, or one too large to decode.
    """
    try:
        image = _open(data)
        width, height = image.size
        return (height, width) if _orientation(image, data) >= 5 else (width, height)
    except _UNREADABLE as error:
        raise DataError(f"{key}: {_reason(data, error)}") from error


def decode_image(
    data: bytes,
    key: str,
    background: tuple[int, int, int] = WHITE,
    *,
    target: Size | None = None,
) -> Pixels:
    """The pixels of an image file, upright, in 8-bit sRGB, transparency on `background`.

    Args:
        target: width and height, upright, that the pixels will be resized to. A JPEG of at least
            four times that is decoded at 1/2, 1/4 or 1/8, in a third to two thirds of the time;
            what comes back then is not of the file's size (`read_size`), but at least twice
            `target` on both sides.

    Raises:
        DataError: not an image, truncated or broken, or too large; with the key and the reason.
    """
    return decode_with_alpha(data, key, background, target=target)[0]


def decode_with_alpha(
    data: bytes,
    key: str,
    background: tuple[int, int, int] = WHITE,
    *,
    target: Size | None = None,
) -> tuple[Pixels, NDArray[np.uint8] | None]:
    """`decode_image`, and the image's alpha channel (H, W): 0 is transparent; None without one."""
    try:
        seen, alpha = _decode(data, background, target, managed=True)
        return np.asarray(seen), None if alpha is None else np.asarray(alpha)
    except _UNREADABLE as error:
        raise DataError(f"{key}: {_reason(data, error)}") from error


def decode_mask(data: bytes, key: str) -> NDArray[np.uint8]:
    """The red channel (H, W) of a mask picture, upright; what is transparent counts as black.

    Its colour profile is passed over: the numbers are weights, not colours.

    Raises:
        DataError: as `decode_image`.
    """
    try:
        seen, _ = _decode(data, _BLACK, None, managed=False)
        return np.asarray(seen.getchannel("R"))
    except _UNREADABLE as error:
        raise DataError(f"{key}: {_reason(data, error)}") from error


def fit_image(
    pixels: NDArray[np.uint8],
    geometry: Geometry,
    background: tuple[int, ...],
    interpolation: Interpolation | None = None,
) -> NDArray[np.uint8]:
    """Bring an image (H, W, 3), or a mask (H, W), to its bucket: resize, then cut or pad.

    Without `interpolation` shrinking averages areas and anything else is Lanczos, as in sd-scripts,
    which calls OpenCV's area filter for the first; Pillow's box filter is the same average, rounded
    elsewhere.
    """
    height, width = pixels.shape[:2]
    wide, high = geometry.resized
    if (width, height) != (wide, high):
        shrinks = width >= wide and height >= high
        method = _FILTERS[interpolation or ("area" if shrinks else "lanczos")]
        pixels = np.asarray(Image.fromarray(pixels).resize((wide, high), method))
    bucket_width, bucket_height = geometry.bucket
    (left, top), (x, y) = geometry.crop, geometry.paste
    cut = pixels[top : top + bucket_height, left : left + bucket_width]
    if cut.shape[:2] == (bucket_height, bucket_width):
        return cut
    canvas = np.empty((bucket_height, bucket_width, *pixels.shape[2:]), np.uint8)
    canvas[:] = background
    canvas[y : y + cut.shape[0], x : x + cut.shape[1]] = cut
    return canvas


def encoder_input(pixels: Pixels) -> NDArray[np.float32]:
    """(H, W, 3) bytes to (3, H, W) float32 in -1..1, rounded as torchvision's ToTensor does."""
    half = np.float32(0.5)
    signed = (pixels.astype(np.float32) / np.float32(255) - half) / half
    return np.ascontiguousarray(signed.transpose(2, 0, 1))


@cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats that can be read with what is installed."""
    with suppress(ImportError):
        importlib.import_module("pillow_jxl")  # makes itself known to Pillow
    Image.init()
    return tuple(name for name in _READ_FORMATS if name in Image.OPEN)


def _open(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(_JXL_BEGINNINGS) and "JXL" in _formats():
        _check_area(_jxl_size(data))  # its reader decodes before it tells the size
    image = Image.open(io.BytesIO(data), formats=_formats())
    _check_area(image.size)
    if image.format in ("JPEG", "MPO"):
        _check_scans(data)
    return image


def _check_area(size: Size) -> None:
    if size[0] * size[1] > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{size[0]}x{size[1]} px is more than {MAX_IMAGE_PIXELS / 1e6:.0f} million "
            "pixels; shrink it"
        )
    if max(size) > MAX_SIDE:
        raise ValueError(f"{size[0]}x{size[1]} px: a side is longer than {MAX_SIDE} px; cut it")


def _check_scans(data: bytes) -> None:
    start = 2
    while data[start : start + 1] == b"\xff" and data[start + 1 : start + 2] != b"\xda":
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    scans = data.count(b"\xff\xda", start)  # compressed data has no such pair
    if scans > _MAX_JPEG_SCANS:
        raise ValueError(f"a JPEG of {scans} scans, more than {_MAX_JPEG_SCANS}; save it anew")


def _jxl_size(data: bytes) -> Size:
    """Width and height in the header of a JPEG XL image.

    Source: ISO/IEC 18181-1, SizeHeader; boxes as in ISO/IEC 18181-2.
    """
    start = 0
    if not data.startswith(b"\xff\x0a"):
        kind = b""
        while kind not in (b"jxlc", b"jxlp"):
            length, kind = struct.unpack_from(">I4s", data, start)
            head = 8 if length != 1 else 16
            body, start = start + head, start + max(head, length)
            if length == 1:
                start = body - head + max(head, struct.unpack_from(">Q", data, body - 8)[0])
        start = body + (4 if kind == b"jxlp" else 0)
    bits = int.from_bytes(data[start + 2 : start + 14], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits % (1 << count), bits >> count
        return value

    def side() -> int:
        return 8 * take(5) + 8 if in_eights else take((9, 13, 18, 30)[take(2)]) + 1

    in_eights = take(1)
    height = side()
    ratio = take(3)
    if ratio == 0:
        return side(), height
    across, down = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height * across // down, height


def _orientation(image: ImageFile.ImageFile, data: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 where the EXIF block is absent or broken."""
    if image.format == "TIFF":
        return 1  # Pillow turns these by itself
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # turned by its decoder; its EXIF block is for information only
    try:
        if image.format == "PNG" and "exif" not in image.info and b"eXIf" not in data:
            # PngImageFile's own would decode the whole image to look behind the pixels.
            exif = Image.Image.getexif(image)
        else:
            exif = image.getexif()
        value = exif.get(_ORIENTATION_TAG, 1)
        return value if value in _TURNS else 1
    except _UNREADABLE:
        return 1


def _decode(
    data: bytes, background: tuple[int, int, int], target: Size | None, *, managed: bool
) -> tuple[Image.Image, Image.Image | None]:
    """The image in RGB and its alpha channel, upright."""
    image = _open(data)
    orientation = _orientation(image, data)
    if target is not None and image.format in ("JPEG", "MPO"):
        wide, high = target if orientation < 5 else target[::-1]
        image.draft(None, (2 * wide, 2 * high))  # at least this size
    _scale_transparency(image)
    image.load()
    profile = image.info.get("icc_profile") if managed else None
    seen, alpha = _split(_eight_bits(image))
    del image  # what is allowed is still a third of a gigabyte, and each step makes another
    seen = _to_srgb(seen, profile)
    if alpha is not None:
        canvas = Image.new("RGB", seen.size, background)
        canvas.paste(seen, mask=alpha)
        seen = canvas
    turn = _TURNS.get(orientation)
    if turn is None:
        return seen, alpha
    return seen.transpose(turn), alpha.transpose(turn) if alpha else None


def _scale_transparency(image: ImageFile.ImageFile) -> None:
    """Pillow leaves a PNG's transparent colour at the file's depth, but scales its pixels to 8."""
    clear = image.info.get("transparency")
    if image.format != "PNG" or not image.tile:
        return
    depth = image.tile[0][3]
    if depth in ("L;2", "L;4") and isinstance(clear, int):
        image.info["transparency"] = clear * (85 if depth == "L;2" else 17)
    elif depth == "RGB;16B" and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of 32 holding 16 or fractions; Pillow's own conversion clips at 255."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    deep = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535.0
    if not (deep.min() >= 0 and deep.max() <= top):  # NaN is neither
        raise ValueError(f"grey values outside 0 to {top:.0f}; convert it to 8 or 16 bits")
    if image.mode == "F":
        scaled = np.rint(deep * np.float32(255)).astype(np.uint8)
    else:
        scaled = np.rint(np.arange(65536) * (255 / top)).astype(np.uint8)[deep]
    grey = Image.fromarray(scaled)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        alpha = Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8))
        grey = Image.merge("LA", (grey, alpha))
    return grey


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours, in a mode that a profile can belong to, and the alpha channel."""
    if not image.has_transparency_data:
        known = image.mode in ("L", "RGB", "CMYK", "LAB")
        return image if known else image.convert("RGB"), None
    seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    is_grey = image.mode in ("L", "LA", "La")
    return seen.getchannel("R") if is_grey else seen.convert("RGB"), seen.getchannel("A")


def _to_srgb(colours: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB as a browser shows it: through the embedded profile, unless that is broken or of another
    kind of image."""
    try:
        if colours.mode == "LAB":
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        elif profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        else:
            return colours.convert("RGB")
        road = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), colours.mode, "RGB")
        if colours.mode == "RGB" and _changes_nothing(road):
            return colours
        return ImageCms.applyTransform(colours, road) or colours
    except _UNREADABLE:
        if colours.mode == "LAB":
            raise
        return colours.convert("RGB")


def _changes_nothing(road: ImageCms.ImageCmsTransform) -> bool:
    """Whether a profile is sRGB under whatever name, as most are: then its conversion, which may
    take longer than decoding, is spared. Two levels are rounding."""
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(6, 36, 3)
    shown = ImageCms.applyTransform(Image.fromarray(cube), road)
    return bool(np.abs(np.asarray(shown).astype(int) - cube).max() <= 2)


def _reason(data: bytes, error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        for beginning, kind in _OTHER_KINDS.items():
            if re.match(beginning, data[:4096], re.DOTALL):
                return f"not an image that can be read, but {kind}"
        return f"not an image that can be read (begins with {data[:8]!r})"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; shrink it"
    if "MAX_TEXT" in str(error):
        return "text or a colour profile that unpacks to over 1 MB; save it without"
    return str(error).strip() or f"broken ({type(error).__name__})"
