"""A zoo of image files, odd and broken, each made by a program that knows what it painted.

`zoo()` has them all. An exhibit is either shown (then `pixels` is what was painted, transparency on
`GROUND`) or refused (then `refused` is found in the reason).
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin

from raylora.data.pixels.decode import image_suffixes

Painting = NDArray[np.uint8]
Colour = tuple[int, int, int]

GROUND: Colour = (10, 200, 30)
RED, GREEN, BLUE, SAND = (250, 0, 10), (0, 240, 0), (20, 0, 230), (200, 180, 90)


@dataclass(frozen=True)
class Exhibit:
    """One file, and what a reader should make of it."""

    data: bytes
    pixels: Painting | None = None
    alpha: Painting | None = None
    """(H, W), where the file has transparency."""
    off_by: int = 0
    """How far pixels may lie from what was painted: lossy formats and colour profiles round."""
    seam: int = 0
    """So many pixels beside the middle lines are not compared: halved chroma bleeds there."""
    refused: str = ""
    """What the reason of a refusal says, as a regular expression; empty where it is shown."""


# What is painted


def quarters(width: int = 12, height: int = 8) -> Painting:
    """Four colours in four quarters: no flip, turn or swap of channels goes unseen."""
    picture = np.empty((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    picture[:top, :left], picture[:top, left:] = RED, GREEN
    picture[top:, :left], picture[top:, left:] = BLUE, SAND
    return picture


def greys(width: int = 12, height: int = 8, levels: int = 256) -> Painting:
    """(H, W): steps from black to white, of so many levels as a file has."""
    step = np.linspace(0, levels - 1, width).round().astype(np.int64)
    return np.tile((step * 255 // (levels - 1)).astype(np.uint8), (height, 1))


def in_rgb(grey: NDArray[Any]) -> Painting:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def on_ground(picture: Painting, alpha: NDArray[Any]) -> Painting:
    """What is seen of a transparent picture, in float64."""
    share = alpha.astype(np.float64)[..., None] / 255
    return np.rint(picture * share + np.array(GROUND) * (1 - share)).astype(np.uint8)


def left_half(width: int = 12, height: int = 8) -> Painting:
    """An alpha channel: the left half is opaque."""
    alpha = np.zeros((height, width), np.uint8)
    alpha[:, : width // 2] = 255
    return alpha


def slope(width: int = 12, height: int = 8) -> Painting:
    """An alpha channel of many values."""
    return np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))


# Files by Pillow


def saved(image: Image.Image | Painting, form: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    shown = image if isinstance(image, Image.Image) else Image.fromarray(image)
    shown.save(sink, form, **options)
    return sink.getvalue()


def oriented(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def stored_for(number: int, upright: Painting) -> Painting:
    """What a camera stores so that a reader who obeys EXIF orientation `number` sees `upright`."""
    undo: dict[int, Callable[[Painting], Painting]] = {
        1: lambda seen: seen,
        2: lambda seen: seen[:, ::-1],
        3: lambda seen: seen[::-1, ::-1],
        4: lambda seen: seen[::-1],
        5: lambda seen: seen.transpose(1, 0, 2),
        6: lambda seen: seen.transpose(1, 0, 2)[::-1],
        7: lambda seen: seen.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda seen: seen.transpose(1, 0, 2)[:, ::-1],
    }
    return np.ascontiguousarray(undo[number](upright))


# PNG by hand


def chunk(kind: bytes, body: bytes, *, wrong: int = 0) -> bytes:
    checksum = zlib.crc32(kind + body) ^ wrong
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def header(width: int, height: int, depth: int = 8, kind: int = 2, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlace))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def packed(samples: NDArray[Any], depth: int) -> bytes:
    """Rows of a PNG, unfiltered; samples (H, W) or (H, W, channels) of `depth` bits."""
    rows = samples.reshape(len(samples), -1)
    if depth == 16:
        flat = rows.astype(">u2").view(np.uint8).reshape(len(rows), -1)
    elif depth == 8:
        flat = rows.astype(np.uint8)
    else:
        shifts = np.arange(depth - 1, -1, -1)
        bits = (rows[..., None] >> shifts & 1).reshape(len(rows), -1).astype(np.uint8)
        flat = np.packbits(bits, axis=1)
    return b"".join(b"\0" + row.tobytes() for row in flat)


def raw_png(samples: NDArray[Any], depth: int, kind: int, *before: bytes) -> bytes:
    height, width = samples.shape[:2]
    data = chunk(b"IDAT", zlib.compress(packed(samples, depth)))
    return png(header(width, height, depth, kind), *before, data)


def interlaced(picture: Painting) -> bytes:
    """Adam7: seven passes, each a coarse grid of the picture."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4)]
    passes += [(1, 0, 2, 2), (0, 1, 1, 2)]
    parts = [picture[y::down, x::across] for x, y, across, down in passes]
    rows = b"".join(packed(part, 8) for part in parts if part.size)
    height, width = picture.shape[:2]
    return png(header(width, height, interlace=1), chunk(b"IDAT", zlib.compress(rows)))


def promised(width: int, height: int, *before: bytes) -> bytes:
    """A PNG header that promises anything, over no pixels at all."""
    return png(header(width, height), *before, chunk(b"IDAT", zlib.compress(b"")))


def text_bomb(size: int) -> bytes:
    return chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(size)))


def plain_idat() -> bytes:
    return chunk(b"IDAT", zlib.compress(packed(quarters(), 8)))


def animated_png() -> bytes:
    frames = [Image.fromarray(quarters()), Image.new("RGB", (12, 8), GREEN)]
    return saved(frames[0], save_all=True, append_images=frames[1:])


# JPEG by hand


def jpeg(picture: Painting | Image.Image, **options: Any) -> bytes:
    return saved(picture, "JPEG", **{"quality": 95, "subsampling": 0, **options})


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment before the pixels."""
    place = 2
    while data[place + 1] != 0xDA:
        yield data[place + 1], place
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")


def resized_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header promises another size."""
    data = jpeg(quarters(16, 16))
    frame = next(place for marker, place in jpeg_segments(data) if marker in (0xC0, 0xC2))
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def scan_bomb(scans: int) -> bytes:
    """A progressive JPEG of many scans: each is a few bytes and a walk over the whole image."""
    data = jpeg(Image.new("L", (64, 64), 100), progressive=True)
    table = segment(0xC4, bytes([0x10, 1, *[0] * 15, 0xE0]))  # one code: a run of 2^14 blocks
    scan = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + b"\x00\x7f"
    start = next(place for marker, place in jpeg_segments(data) if marker == 0xC4)
    return data[:start] + table + scan * scans + b"\xff\xd9"


def with_exif(exif: bytes, picture: Painting | None = None) -> bytes:
    """A JPEG with an EXIF block of any length, cut into segments."""
    data = jpeg(quarters(32, 32) if picture is None else picture)
    parts = [exif[start : start + 65_000] for start in range(0, len(exif), 65_000)]
    blocks = b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts)
    return data[:2] + blocks + data[2:]


def tag_bomb(tags: int, size: int) -> bytes:
    """A TIFF directory whose tags all claim the same megabytes."""
    payload = 8 + 2 + 12 * tags + 4
    entries = (struct.pack("<HHLL", 0x1000 + i, 7, size, payload) for i in range(tags))
    head = b"II*\0" + struct.pack("<LH", 8, tags)
    return head + b"".join(entries) + bytes(4) + bytes(size)


def inked(picture: Painting) -> Image.Image:
    """The picture in CMYK, without black."""
    inks = np.concatenate([255 - picture, np.zeros_like(picture[..., :1])], axis=2)
    return Image.frombytes("CMYK", picture.shape[1::-1], inks.tobytes())


def ycck(picture: Painting) -> bytes:
    """Photoshop's CMYK JPEG: inks turned to Y Cb Cr, as its Adobe marker says."""
    inks = np.asarray(Image.fromarray(255 - picture).convert("YCbCr"))
    black = np.full_like(inks[..., :1], 255)
    stored = 255 - np.concatenate([inks, black], axis=2)  # Pillow inverts what it writes
    data = jpeg(Image.frombytes("CMYK", picture.shape[1::-1], stored.tobytes()))
    adobe = data.index(b"Adobe")
    return data[: adobe + 11] + b"\x02" + data[adobe + 12 :]


# Colour profiles by hand

_D50 = (0.9642, 1.0, 0.8249)
# Display P3 and sRGB, adapted to D50, as their profiles have them; columns are red, green, blue.
_P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
_SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 4) + b"zoo\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + fixed(*_D50),
        **tags,
    }
    place = 128 + 4 + 12 * len(tags)
    table, bodies = struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        table += name + struct.pack(">II", place + len(bodies), len(body))
        bodies += body + bytes(-len(body) % 4)
    head = struct.pack(">II", place + len(bodies), 0) + b"\x02\x20\0\0" + kind + space + pcs
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*_D50)
    return head.ljust(128, b"\0") + table + bodies


def gamma_curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def srgb_table() -> bytes:
    """The curve of sRGB in 1024 points, as the common profiles have it."""
    shown = np.arange(1024) / 1023
    linear = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    points = np.rint(linear * 65535).astype(">u2").tobytes()
    return b"curv" + bytes(4) + struct.pack(">I", 1024) + points


def rgb_profile(primaries: NDArray[np.float64], curve: bytes) -> bytes:
    tags = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True):
        tags[name] = b"XYZ " + bytes(4) + fixed(*column)
    return profile(b"mntr", b"RGB ", b"XYZ ", tags)


def ink_profile(papers: dict[tuple[int, int, int, int], tuple[int, int, int]]) -> bytes:
    """A CMYK profile of two levels an ink: each of 16 mixtures is black but for those given, as
    8-bit Lab."""
    straight = bytes(range(256))
    mixtures = [tuple(number >> shift & 1 for shift in (3, 2, 1, 0)) for number in range(16)]
    grid = b"".join(bytes(papers.get(mix, (0, 128, 128))) for mix in mixtures)  # type: ignore[call-overload]
    body = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    body += straight * 4 + grid + straight * 3
    return profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": body})


def srgb_encoded(linear: NDArray[np.float64]) -> Painting:
    low = linear * 12.92
    high = 1.055 * np.clip(linear, 0, None) ** (1 / 2.4) - 0.055
    return np.rint(255 * np.clip(np.where(linear < 0.0031308, low, high), 0, 1)).astype(np.uint8)


def through_p3(picture: Painting, gamma: float) -> Painting:
    """What a picture with a wide profile looks like in sRGB, written from the definitions."""
    xyz = (picture / 255.0) ** gamma @ _P3.T
    return srgb_encoded(xyz @ np.linalg.inv(_SRGB).T)


def of_lab(light: float, a: float, b: float) -> Colour:
    """A colour of CIE Lab, light of D50, in sRGB, written from the definitions."""
    middle = (light + 16) / 116
    xyz = np.array(_D50) * np.array([middle + a / 500, middle, middle - b / 200]) ** 3
    red, green, blue = srgb_encoded(np.linalg.inv(_SRGB) @ xyz).tolist()
    return red, green, blue


def soft_quarters(width: int = 12, height: int = 8) -> Painting:
    """Colours that P3 and sRGB both hold."""
    return (quarters(width, height) // 3 + 80).astype(np.uint8)


# What is not an image, or only promises one

OTHER = {
    "empty": (b"", "the file is empty"),
    "one byte": (b"\x89", "not an image that can be read"),
    "png signature alone": (b"\x89PNG\r\n\x1a\n", "not an image that can be read"),
    "text": (b"a cat on a mat\n", "not an image that can be read, but text"),
    "web page": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "but a web page"),
    "web page after spaces": (b"\n\n <html lang='en'>not found", "but a web page"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "but an SVG drawing"),
    "svg with a head": (b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg width="4"/>', "but an SVG"),
    "zip": (b"PK\x03\x04" + bytes(60), "but a ZIP archive"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "but a PDF document"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript document"),
    "photoshop": (b"8BPS\0\x01" + bytes(6) + b"\0\x03" + bytes(30), "but a Photoshop document"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "but a HEIC image"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs"),
    "film": (b"\0\0\0\x18ftypisom\0\0\x02\0isomiso2" + bytes(99), r"begins with b'\\x00"),
    "zeros": (bytes(4096), r"begins with b'\\x00"),
    "noise": (random.Random(3).randbytes(4096), "begins with"),
}


def refusals() -> dict[str, Exhibit]:
    """Files that cannot or must not be shown."""
    found = {name: Exhibit(data, refused=reason) for name, (data, reason) in OTHER.items()}
    large, huge = "is more than 89 million pixels", "more than 89 million pixels"
    webp = saved(quarters(64, 64), "WEBP", lossless=True)
    film = webps()["webp, animated"].data
    wide = (10_485_771).to_bytes(3, "little") + (7).to_bytes(3, "little")
    bombs: dict[str, tuple[bytes, str]] = {
        "png of 65000 x 65000": (promised(65_000, 65_000), huge),
        "png of 2^31 - 1 squared": (promised(2**31 - 1, 2**31 - 1), huge),
        "png of 10000 x 10000": (promised(10_000, 10_000), f"10000x10000 px {large}"),
        "png of no pixels": (promised(4, 4), "truncated|broken"),
        "png of 9000 x 9000 without pixels": (promised(9_000, 9_000), "truncated|broken"),
        "png of width 0": (promised(0, 4), ""),
        "png whose text unpacks to 80 MB": (promised(4, 4, text_bomb(80_000_000)), "over 1 MB"),
        "png whose profile unpacks to 80 MB": (
            promised(4, 4, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
            "over 1 MB",
        ),
        "png of an unknown kind": (png(header(4, 4, kind=5), plain_idat()), ""),
        "png with pixels before its header": (png(plain_idat(), header(12, 8)), ""),
        "png without a palette": (raw_png(greys() // 64, 8, 3), ""),
        "png that ends at once": (png(), ""),
        "png with a wrong header sum": (
            png(header(12, 8)[:-1] + b"\0", plain_idat()),
            "not an image|checksum|broken",
        ),
        "jpeg of 65500 x 65500": (resized_jpeg(65_500, 65_500), huge),
        "jpeg of 12000 x 8000": (resized_jpeg(12_000, 8_000), large),
        "jpeg of 5000 scans": (scan_bomb(5000), "a JPEG of 500[0-9] scans"),
        "jpeg without its last pixels": (jpeg(quarters(32, 32))[:-40], "truncated"),
        "jpeg without its end": (jpeg(quarters(32, 32))[:-2], "truncated"),
        "png with a wrong sum of its text": (
            png(header(12, 8), chunk(b"tEXt", b"a\0b", wrong=1), plain_idat()),
            "a PNG image with a broken header",
        ),
        "webp of 16383 x 16383": (
            webp[:21] + struct.pack("<I", 16382 | 16382 << 14) + webp[25:],
            huge,
        ),
        "webp of 10485772 x 8": (film[:24] + wide + film[30:], "a side is longer than 65535 px"),
        "png of 70000 x 1": (saved(np.zeros((1, 70_000), np.uint8)), "a side is longer than 65535"),
        "gif of 65535 x 65535": (gif_of(65_535, 65_535), huge),
        "gif of 12000 x 12000": (gif_of(12_000, 12_000), large),
        "bmp of 60000 x 60000": (bmp_of(60_000, 60_000), huge),
        "tiff of 60000 x 60000": (tiff_of(60_000, 60_000), huge),
        "tiff whose tags claim gigabytes": (tag_bomb(3000, 1_000_000), ""),
        "tiff of 32-bit grey beyond 16 bits": (
            saved(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"),
            "grey values outside 0 to 65535",
        ),
        "tiff of grey below zero": (
            saved(Image.fromarray(np.full((4, 4), -1, np.int32)), "TIFF"),
            "grey values outside",
        ),
        "tiff of fractions beyond 1": (
            saved(Image.fromarray(np.full((4, 4), 1.5, np.float32)), "TIFF"),
            "grey values outside 0 to 1",
        ),
        "tiff of no numbers": (
            saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
            "grey values outside 0 to 1",
        ),
        "avif without its pixels": (saved(quarters(64, 64), "AVIF")[:-80], ""),
        "jpeg xl of 2^30 squared": (JXL_BOMB, huge if JXL else "raylora.jxl"),
    }
    for name, (data, reason) in bombs.items():
        found[name] = Exhibit(data, refused=reason or ".")
    return found


def gif_of(width: int, height: int) -> bytes:
    data = saved(Image.fromarray(quarters()), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def bmp_of(width: int, height: int) -> bytes:
    data = saved(quarters(), "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def tiff_of(width: int, height: int) -> bytes:
    data = bytearray(saved(quarters(), "TIFF"))
    (place,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, place)
    for entry in range(place + 2, place + 2 + 12 * count, 12):
        tag = struct.unpack_from("<H", data, entry)[0]
        if tag in (256, 257, 278):
            struct.pack_into("<HI", data, entry + 2, 4, 1)
            struct.pack_into("<I", data, entry + 8, width if tag == 256 else height)
    return bytes(data)


# 12 x 8 `quarters`, lossless, by pillow-jxl-plugin 1.3.8: bare, and in a container with EXIF
# orientation 6, which the format's own orientation overrules.
JXL_PLAIN = bytes.fromhex(
    "ff0a01412408000100ac004b18938e838300a841319291be401000b4940f009dff908ff4cb874f077cfef365"
    "b6429a51b8b88303b408"
)
JXL_BOXED = bytes.fromhex(
    "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20000000116a786c7000000000"
    "ff0a01412400000022457869664d4d002a000000080001011200030000000100060000000000000000003d6a"
    "786c708000000108000100ac004b18938e838300a841319291be401000b4940f009dff908ff4cb874f077cfe"
    "f365b6429a51b8b88303b408"
)
JXL = ".jxl" in image_suffixes()
# A header of height 2^30 and the same width.
JXL_BOMB = b"\xff\x0a" + (0b11 << 1 | (2**30 - 1) << 3 | 1 << 33).to_bytes(6, "little") + bytes(40)


def jpeg_xl() -> dict[str, Exhibit]:
    """Shown where a decoder is installed, else refused with what to install."""
    files = {"jpeg xl": JXL_PLAIN, "jpeg xl in a container": JXL_BOXED}
    if not JXL:
        reason = r"a JPEG XL image; pip install raylora\[jxl\]"
        return {name: Exhibit(data, refused=reason) for name, data in files.items()}
    return {name: Exhibit(data, quarters()) for name, data in files.items()}


# Images that are shown


def pngs() -> dict[str, Exhibit]:
    """PNGs of every depth and kind."""
    seen, grey = quarters(), greys()
    two, four = greys(levels=4), greys(levels=16)
    deep = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
    colours = np.array([RED, GREEN, BLUE, SAND], np.uint8)
    index = np.zeros((8, 12), np.uint8)
    index[:4, 6:], index[4:, :6], index[4:, 6:] = 1, 2, 3
    palette = chunk(b"PLTE", colours.tobytes())
    rgba = np.dstack([seen, slope()])
    first = np.where(index == 0, 0, 255).astype(np.uint8)
    dark = np.where(grey == grey[0, 3], 0, 255).astype(np.uint8)
    light = np.where(two == 255, 0, 255).astype(np.uint8)
    level = np.where(four == four[0, 5], 0, 255).astype(np.uint8)
    one_deep = np.where(deep == deep[0, 5], 0, 255).astype(np.uint8)
    scaled = np.rint(deep / 257.0).astype(np.uint8)

    def clear(*values: int) -> bytes:
        return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))

    def shown(data: bytes, picture: Painting, alpha: Painting | None = None, off: int = 0):
        seen = picture if alpha is None else on_ground(picture, alpha)
        return Exhibit(data, seen, alpha, off_by=off)

    deep_rgb = seen.astype(np.uint16) * 257
    return {
        "rgb": shown(saved(seen), seen),
        "rgb of 16 bits": shown(raw_png(deep_rgb, 16, 2), seen),
        "rgb of 16 bits, one colour transparent": shown(
            raw_png(deep_rgb, 16, 2, clear(*(257 * value for value in RED))), seen, first
        ),
        "rgba": shown(saved(rgba), seen, slope(), 1),
        "rgba of 16 bits": shown(raw_png(rgba.astype(np.uint16) * 257, 16, 6), seen, slope(), 1),
        "rgb, one colour transparent": shown(raw_png(seen, 8, 2, clear(*RED)), seen, first),
        "1 bit": shown(raw_png(greys(levels=2) // 255, 1, 0), in_rgb(greys(levels=2))),
        "grey of 2 bits": shown(raw_png(two // 85, 2, 0), in_rgb(two)),
        "grey of 2 bits, white transparent": shown(
            raw_png(two // 85, 2, 0, clear(3)), in_rgb(two), light
        ),
        "grey of 4 bits": shown(raw_png(four // 17, 4, 0), in_rgb(four)),
        "grey of 4 bits, one transparent": shown(
            raw_png(four // 17, 4, 0, clear(int(four[0, 5]) // 17)), in_rgb(four), level
        ),
        "grey": shown(saved(grey), in_rgb(grey)),
        "grey, one transparent": shown(
            raw_png(grey, 8, 0, clear(int(grey[0, 3]))), in_rgb(grey), dark
        ),
        "grey of 16 bits": shown(raw_png(deep, 16, 0), in_rgb(scaled)),
        "grey of 16 bits, one transparent": shown(
            raw_png(deep, 16, 0, clear(int(deep[0, 5]))), in_rgb(scaled), one_deep
        ),
        "grey with alpha": shown(
            raw_png(np.dstack([grey, slope()]), 8, 4), in_rgb(grey), slope(), 1
        ),
        "grey of 16 bits with alpha": shown(
            raw_png(np.dstack([grey, slope()]).astype(np.uint16) * 257, 16, 4),
            in_rgb(grey),
            slope(),
            1,
        ),
        "palette": shown(raw_png(index, 8, 3, palette), seen),
        "palette of 2 bits": shown(raw_png(index, 2, 3, palette), seen),
        "palette, one colour transparent": shown(
            raw_png(index, 8, 3, palette, chunk(b"tRNS", b"\0")), seen, first
        ),
        "palette, each colour with its alpha": shown(
            raw_png(index, 4, 3, palette, chunk(b"tRNS", bytes([255, 128, 0, 77]))),
            seen,
            np.array([255, 128, 0, 77], np.uint8)[index],
            1,
        ),
        "opaque alpha": shown(
            saved(np.dstack([seen, np.full((8, 12), 255, np.uint8)])),
            seen,
            np.full((8, 12), 255, np.uint8),
        ),
        "interlaced": shown(interlaced(seen), seen),
        "animated png": shown(animated_png(), seen),
    }


def odd_pngs() -> dict[str, Exhibit]:
    """PNGs whose chunks are odd and whose pixels are good."""
    seen, head, pixels = quarters(), header(12, 8), plain_idat()
    rows = zlib.compress(packed(seen, 8))
    crumbs = b"".join(chunk(b"IDAT", rows[place : place + 1]) for place in range(len(rows)))
    sideways = oriented(6).tobytes().removeprefix(b"Exif\0\0")
    stored = zlib.compress(packed(stored_for(6, seen), 8))
    tall, turned = header(8, 12), chunk(b"IDAT", stored)
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
    exif = b"MM\0*" + struct.pack(">IH", 8, 1) + struct.pack(">HHII", 0x010E, 2, 3_000_000, 26)
    files = {
        "png in crumbs": png(head, crumbs),
        "png with text of 3 MB": png(head, chunk(b"tEXt", b"prompt\0" + b"a" * 3_000_000), pixels),
        "png with text behind its pixels": png(head, pixels, chunk(b"tEXt", b"a\0b")),
        "png with a chunk nobody knows": png(head, chunk(b"zooA", bytes(999)), pixels),
        "png with exif of 3 MB": png(head, chunk(b"eXIf", exif + bytes(3_000_004)), pixels),
        "png with broken exif": png(head, chunk(b"eXIf", b"II*\0garbage"), pixels),
        "png with a broken profile": png(
            head, chunk(b"iCCP", b"a\0\0" + zlib.compress(b"no profile")), pixels
        ),
        "png with a profile that is no zlib": png(head, chunk(b"iCCP", b"a\0\0zzzz"), pixels),
        "png with bytes behind its end": png(head, pixels) + b"PK\x03\x04" * 99,
        "png without its end": png(head, pixels)[:-12],
        "png turned by exif": png(tall, chunk(b"eXIf", sideways), turned),
        "png turned by exif behind its pixels": png(tall, turned, chunk(b"eXIf", sideways)),
        "png turned by xmp": png(tall, chunk(b"iTXt", xmp), turned),
    }
    return {name: Exhibit(data, seen) for name, data in files.items()}


def jpegs() -> dict[str, Exhibit]:
    """JPEGs, and other names for them; 4 levels is what quality 95 rounds away in flat colours."""
    seen = quarters(32, 32)
    broad = quarters(64, 32)
    grey = np.tile(np.array([[20, 90, 160, 230]], np.uint8).repeat(8), (16, 1))
    tags = struct.pack("<HHLL", 0x0112, 3, 1, 6)
    lying = b"II*\0" + struct.pack("<LH", 8, 60_000) + tags  # claims tags that are not there
    endless = b"II*\0" + struct.pack("<LH", 8, 1) + struct.pack("<HHLL", 0x8769, 4, 1, 8)
    files: dict[str, tuple[bytes, Painting]] = {
        "jpeg": (jpeg(seen), seen),
        "jpeg, progressive": (jpeg(seen, progressive=True), seen),
        "jpeg with restarts": (jpeg(seen, restart_marker_blocks=1), seen),
        "jpeg, grey": (jpeg(Image.fromarray(grey)), in_rgb(grey)),
        "jpeg, cmyk": (jpeg(inked(seen)), seen),
        "jpeg, ycck": (ycck(seen), seen),
        "jpeg with two pictures": (
            saved(
                Image.fromarray(seen),
                "MPO",
                quality=95,
                subsampling=0,
                save_all=True,
                append_images=[Image.new("RGB", (9, 9))],
            ),
            seen,
        ),
        "jpeg with exif of 3 MB": (with_exif(oriented(1).tobytes()[6:] + bytes(3_000_000)), seen),
        "jpeg whose exif claims gigabytes": (with_exif(tag_bomb(5000, 900_000)), seen),
        "jpeg with broken exif": (with_exif(b"II*\0garbage"), seen),
        "jpeg with exif that ends early": (with_exif(lying, stored_for(6, broad)), broad),
        "jpeg with exif that holds itself": (with_exif(endless + bytes(4)), seen),
        "jpeg turned by 9": (with_exif(oriented(9).tobytes()[6:]), seen),
        "jpeg with bytes behind its end": (jpeg(seen) + bytes(5000), seen),
        "jpeg of 100 scans": (scan_bomb(100), np.full((64, 64, 3), 128, np.uint8)),
    }
    for number in range(1, 9):
        data = jpeg(stored_for(number, broad), exif=oriented(number))
        files[f"jpeg turned by {number}"] = (data, broad)
    found = {name: Exhibit(data, picture, off_by=4) for name, (data, picture) in files.items()}
    found["jpeg, subsampled"] = Exhibit(jpeg(seen, subsampling=2), seen, off_by=4, seam=2)
    return found


def profiles() -> dict[str, Exhibit]:
    """Images with colour profiles: shown as a browser shows them."""
    soft, grey = soft_quarters(), greys()
    wide = rgb_profile(_P3, gamma_curve(2.2))
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    many = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    table = rgb_profile(_SRGB, curve=srgb_table())
    darker = profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": gamma_curve(1.8)})
    darker_seen = srgb_encoded((grey / 255.0) ** 1.8)
    inks = ink_profile({(0, 0, 0, 0): (255, 128, 128), (1, 0, 0, 0): (255 * 60 // 100, 98, 148)})
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    ink.paste((0, 0, 0, 0), (0, 0, 16, 8))
    printed = np.full((16, 16, 3), 255, np.uint8)
    printed[8:] = of_lab(60, -30, 20)
    alpha = np.dstack([soft, left_half()])
    return {
        "wide profile": Exhibit(saved(soft, icc_profile=wide), through_p3(soft, 2.2), off_by=2),
        "wide profile in a jpeg": Exhibit(
            jpeg(soft_quarters(32, 32), icc_profile=wide),
            through_p3(soft_quarters(32, 32), 2.2),
            off_by=5,
        ),
        "wide profile and alpha": Exhibit(
            saved(alpha, icc_profile=wide),
            on_ground(through_p3(soft, 2.2), left_half()),
            left_half(),
            off_by=2,
        ),
        "sRGB": Exhibit(saved(many, icc_profile=same), many),
        "sRGB of another maker": Exhibit(saved(many, icc_profile=table), many),
        "nearly sRGB": Exhibit(
            saved(many, icc_profile=rgb_profile(_SRGB, gamma_curve(2.0))),
            srgb_encoded((many / 255.0) ** 2.0),
            off_by=2,
        ),
        "grey profile": Exhibit(saved(grey, icc_profile=darker), in_rgb(darker_seen), off_by=2),
        "grey image with an RGB profile": Exhibit(saved(grey, icc_profile=wide), in_rgb(grey)),
        "RGB image with a grey profile": Exhibit(saved(soft, icc_profile=darker), soft),
        "RGB image with an ink profile": Exhibit(saved(soft, icc_profile=inks), soft),
        "profile cut short": Exhibit(saved(soft, icc_profile=wide[:200]), soft),
        "profile of zeros": Exhibit(saved(soft, icc_profile=bytes(3000)), soft),
        "ink profile": Exhibit(jpeg(ink, icc_profile=inks), printed, off_by=5),
    }


def webps() -> dict[str, Exhibit]:
    """WebP, AVIF, GIF and BMP."""
    seen, alpha = quarters(), left_half()
    large, large_alpha = quarters(64, 64), left_half(64, 64)
    frames = [Image.fromarray(seen), Image.new("RGB", (12, 8), GREEN)]
    rgba = np.dstack([seen, alpha])
    clear = Image.fromarray(rgba)
    many: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    sideways = {"exif": oriented(6), "quality": 95}
    top_down = saved(seen[::-1], "BMP")
    shown = on_ground(seen, alpha)
    return {
        "webp": Exhibit(saved(seen, "WEBP", lossless=True), seen),
        "webp, lossy": Exhibit(saved(large, "WEBP", quality=95), large, off_by=4, seam=2),
        "webp with alpha": Exhibit(saved(rgba, "WEBP", lossless=True), shown, alpha),
        "webp, animated": Exhibit(
            saved(frames[0], "WEBP", lossless=True, **many), seen, np.full_like(alpha, 255)
        ),
        "webp turned": Exhibit(
            saved(stored_for(6, seen), "WEBP", lossless=True, exif=oriented(6)), seen
        ),
        "avif": Exhibit(saved(large, "AVIF", quality=95, subsampling="4:4:4"), large, off_by=12),
        "avif with alpha": Exhibit(
            saved(np.dstack([large, large_alpha]), "AVIF", quality=95, subsampling="4:4:4"),
            on_ground(large, large_alpha),
            large_alpha,
            off_by=12,
        ),
        "avif turned": Exhibit(
            saved(stored_for(6, large), "AVIF", subsampling="4:4:4", **sideways), large, off_by=12
        ),
        "avif, animated": Exhibit(
            saved(
                Image.fromarray(large),
                "AVIF",
                quality=95,
                subsampling="4:4:4",
                save_all=True,
                append_images=[Image.new("RGB", (64, 64), GREEN)],
            ),
            large,
            off_by=12,
        ),
        "gif": Exhibit(saved(frames[0], "GIF"), seen),
        "gif, animated": Exhibit(saved(frames[0], "GIF", **many), seen),
        "gif with a transparent colour": Exhibit(saved(clear, "GIF"), shown, alpha),
        "gif, interlaced": Exhibit(saved(frames[0], "GIF", interlace=1), seen),
        "bmp": Exhibit(saved(seen, "BMP"), seen),
        "bmp from the top": Exhibit(top_down[:22] + struct.pack("<i", -8) + top_down[26:], seen),
        "bmp of 256 colours": Exhibit(saved(frames[0].quantize(8), "BMP"), seen),
        "bmp of 1 bit": Exhibit(
            saved(Image.fromarray(greys(levels=2)).convert("1"), "BMP"), in_rgb(greys(levels=2))
        ),
    }


def tiffs() -> dict[str, Exhibit]:
    """TIFFs, which come under the names of other images."""
    seen, grey = quarters(), greys()
    deep = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
    fractions = np.linspace(0, 1, 96, dtype=np.float32).reshape(8, 12)
    rgba = Image.fromarray(np.dstack([seen, left_half()]))
    lab = np.empty((8, 12, 3), np.uint8)
    lab[:] = (255 * 60 // 100, (256 - 30), 20)  # a and b are signed bytes
    turned = TiffImagePlugin.ImageFileDirectory_v2()
    turned[0x0112] = 6
    shown = on_ground(seen, left_half())
    pages = {"save_all": True, "append_images": [Image.new("RGB", (5, 5))]}
    return {
        "tiff": Exhibit(saved(seen, "TIFF"), seen),
        "tiff, lzw": Exhibit(saved(seen, "TIFF", compression="tiff_lzw"), seen),
        "tiff, deflate": Exhibit(saved(seen, "TIFF", compression="tiff_adobe_deflate"), seen),
        "tiff, jpeg": Exhibit(
            saved(quarters(32, 32), "TIFF", compression="jpeg", quality=95),
            quarters(32, 32),
            off_by=4,
            seam=2,
        ),
        "tiff of pages": Exhibit(saved(Image.fromarray(seen), "TIFF", **pages), seen),
        "tiff with alpha": Exhibit(saved(rgba, "TIFF"), shown, left_half()),
        "tiff turned": Exhibit(saved(stored_for(6, seen), "TIFF", tiffinfo=turned), seen),
        "tiff turned, lzw": Exhibit(
            saved(stored_for(6, seen), "TIFF", tiffinfo=turned, compression="tiff_lzw"), seen
        ),
        "tiff of 16 bits": Exhibit(saved(deep, "TIFF"), in_rgb(np.rint(deep / 257.0))),
        "tiff of 32 bits": Exhibit(
            saved(deep.astype(np.int32), "TIFF"), in_rgb(np.rint(deep / 257.0))
        ),
        "tiff of fractions": Exhibit(
            saved(fractions, "TIFF"), in_rgb(np.rint(fractions * 255.0)), off_by=1
        ),
        "tiff, grey": Exhibit(saved(grey, "TIFF"), in_rgb(grey)),
        "tiff, cmyk": Exhibit(saved(inked(seen), "TIFF"), seen),
        "tiff, lab": Exhibit(
            saved(Image.frombytes("LAB", (12, 8), lab.tobytes()), "TIFF"),
            np.full((8, 12, 3), of_lab(60, -30, 20), np.uint8),
            off_by=3,
        ),
    }


def sizes() -> dict[str, Exhibit]:
    """Very small and very thin."""
    thin = np.tile(np.array([RED, BLUE], np.uint8), (1500, 1))[None]
    dot = np.array([[SAND]], np.uint8)
    long = np.broadcast_to(np.array(SAND, np.uint8), (1, 65_535, 3))
    return {
        "one pixel": Exhibit(saved(dot), dot),
        "one pixel, jpeg": Exhibit(jpeg(dot), dot, off_by=4),
        "3000 x 1": Exhibit(saved(thin), thin),
        "65535 x 1": Exhibit(saved(long), long),
        "1 x 3000": Exhibit(saved(thin.transpose(1, 0, 2)), thin.transpose(1, 0, 2)),
        "1 x 3000, webp": Exhibit(
            saved(thin.transpose(1, 0, 2), "WEBP", lossless=True), thin.transpose(1, 0, 2)
        ),
    }


@cache
def zoo() -> dict[str, Exhibit]:
    """Every exhibit by its name."""
    parts = [pngs(), odd_pngs(), jpegs(), profiles(), webps(), tiffs(), sizes(), jpeg_xl()]
    parts.append(refusals())
    found = {name: exhibit for part in parts for name, exhibit in part.items()}
    assert len(found) == sum(map(len, parts)), "two exhibits of one name"
    return found
