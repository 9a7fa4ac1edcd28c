"""A zoo of odd and broken files: each is decoded right, or refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from datafolders import image_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raylora.base.errors import DataError
from raylora.data.bucket import Buckets, Geometry
from raylora.data.decode import decode_image, encoder_input, fit_image, read_size

GREEN = (0, 255, 0)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def two_tone(mode: str, left: Any, right: Any) -> Image.Image:
    """6 x 4 pixels, the left half one colour and the right half another."""
    image = Image.new(mode, (6, 4), right)
    image.paste(left, (0, 0, 3, 4))
    return image


def turned(orientation: int) -> bytes:
    """A JPEG that is red left and blue right in the file, to be turned by its EXIF block."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = two_tone("RGB", (255, 0, 0), (0, 0, 255)).resize((48, 32), Image.Resampling.NEAREST)
    return saved(image, "JPEG", quality=95, exif=exif)


def palette_with_alpha() -> bytes:
    image = two_tone("P", 0, 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return saved(image, transparency=1)


def deep_grey() -> bytes:
    grey = np.full((4, 6), 257 * 200, np.uint16)
    grey[:, :3] = 257 * 10
    return saved(Image.fromarray(grey))


def fractions() -> bytes:
    grey = np.full((4, 6), 0.5, np.float32)
    grey[:, :3] = 0.0
    return saved(Image.fromarray(grey), "TIFF")


def animated() -> bytes:
    frames = [two_tone("RGB", (255, 0, 0), (0, 0, 255)), two_tone("RGB", GREEN, GREEN)]
    return saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


def png(width: int, height: int, *, text_bytes: int = 0) -> bytes:
    """A PNG header that promises anything, over no pixels at all."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(text_bytes))) if text_bytes else b""
    body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + body


def broken_exif() -> bytes:
    return saved(two_tone("RGB", (255, 0, 0), (0, 0, 255)), "PNG", exif=b"Exif\0\0II*\0garbage")


RED, BLUE = (255, 0, 0), (0, 0, 255)

READABLE: dict[str, tuple[Callable[[], bytes], tuple[int, ...], tuple[int, ...]]] = {
    # what it is: bytes, colour on the left, colour on the right
    "rgb": (lambda: saved(two_tone("RGB", RED, BLUE)), RED, BLUE),
    "bmp": (lambda: saved(two_tone("RGB", RED, BLUE), "BMP"), RED, BLUE),
    "palette": (lambda: saved(two_tone("RGB", RED, BLUE).quantize(4)), RED, BLUE),
    "palette with a transparent colour": (palette_with_alpha, RED, GREEN),
    "one bit": (lambda: saved(two_tone("1", 0, 1)), (0, 0, 0), (255, 255, 255)),
    "grey": (lambda: saved(two_tone("L", 10, 200)), (10,) * 3, (200,) * 3),
    "grey with alpha": (lambda: saved(two_tone("LA", (10, 255), (9, 0))), (10,) * 3, GREEN),
    "transparent": (lambda: saved(two_tone("RGBA", (*RED, 255), (9, 9, 9, 0))), RED, GREEN),
    "half transparent": (
        lambda: saved(two_tone("RGBA", (*RED, 255), (*RED, 128))),
        RED,
        (128, 127, 0),
    ),
    "cmyk": (
        lambda: saved(two_tone("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "TIFF"),
        RED,
        BLUE,
    ),
    "16 bit grey": (deep_grey, (10,) * 3, (200,) * 3),
    "float grey": (fractions, (0, 0, 0), (128, 128, 128)),
    "animated": (animated, RED, BLUE),
    "broken exif": (broken_exif, RED, BLUE),
    "a png named jpg": (lambda: saved(two_tone("RGB", RED, BLUE)), RED, BLUE),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", READABLE)
def test_odd_files_are_decoded_right(kind: str):
    make, left, right = READABLE[kind]
    data = make()
    pixels = decode_image(data, "odd.jpg", GREEN)
    assert (pixels.shape, pixels.dtype) == ((4, 6, 3), np.uint8)
    assert read_size(data, "odd.jpg") == (6, 4)
    assert tuple(pixels[1, 1]) == left
    assert tuple(pixels[1, 4]) == right


@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [
        (1, (48, 32), (16, 4)),
        (3, (48, 32), (16, 44)),
        (6, (32, 48), (4, 16)),
        (8, (32, 48), (44, 16)),
    ],
)
def test_exif_orientation_is_obeyed(
    orientation: int, size: tuple[int, int], red_at: tuple[int, int]
):
    data = turned(orientation)
    pixels = decode_image(data, "phone.jpg")
    assert read_size(data, "phone.jpg") == size == (pixels.shape[1], pixels.shape[0])
    red, _, blue = pixels[red_at].astype(int)
    assert red > 200
    assert blue < 50


def lab() -> bytes:
    return saved(Image.new("LAB", (4, 4)), "TIFF")


def wide_grey() -> bytes:
    return saved(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")


UNREADABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "the file is empty"),
    "text": (lambda: b"<html>not found</html>", "not an image that can be read"),
    "bomb": (lambda: png(65_000, 65_000), "4225000000 pixels. exceeds limit"),
    "large": (lambda: png(10_000, 10_000), "10000x10000 px is more than 89 million"),
    "giant text": (lambda: png(4, 4, text_bytes=80_000_000), "(?i)text|decompress"),
    "no pixels": (lambda: png(4, 4), "bad.png: "),
    "truncated jpeg": (lambda: image_bytes((200, 200), 1, "JPEG")[:-600], "truncated"),
    "truncated png": (lambda: image_bytes((200, 200), 1)[:-3000], "truncated"),
    "truncated webp": (lambda: image_bytes((200, 200), 1, "WEBP")[:-300], "bad.png: "),
    "truncated bmp": (lambda: image_bytes((200, 200), 1, "BMP")[:-300], "truncated"),
    "grey beyond 16 bits": (wide_grey, "grey values outside 0 to 65535"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_files_are_refused_with_key_and_reason(kind: str):
    make, reason = UNREADABLE[kind]
    with pytest.raises(DataError, match=reason) as caught:
        decode_image(make(), "bad.png")
    assert str(caught.value).startswith("bad.png: ")


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]),
    st.integers(0, 2**32),
    st.integers(1, 30),
)
@pytest.mark.filterwarnings("ignore")
def test_no_damage_to_a_file_raises_anything_but_a_data_error(form: str, seed: int, count: int):
    draw = np.random.default_rng(seed)
    data = np.frombuffer(image_bytes((24, 16), 1, form), np.uint8).copy()
    data[draw.integers(0, len(data), count)] = draw.integers(0, 256, count)
    try:
        pixels = decode_image(data.tobytes(), "damaged")
    except DataError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3


def test_shrinking_averages_areas_and_crops_the_centre():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 200
    geometry = Buckets((16, 16), enabled=False).place((80, 40))
    fitted = fit_image(pixels, geometry, (0, 0, 0))
    assert fitted.shape == (16, 16, 3)
    assert (fitted == 200).all()
    checks = np.indices((32, 32)).sum(0) % 2 * 254
    grey = np.repeat(checks[..., None], 3, axis=2).astype(np.uint8)
    halved = fit_image(grey, Geometry((16, 16), (16, 16), (0, 0), (0, 0)), (0, 0, 0))
    assert (halved == 127).all()


def test_padding_fills_with_the_background():
    pixels = np.full((20, 10, 3), 9, np.uint8)
    geometry = Buckets((64, 64), enabled=False).place((10, 20), "pad")
    fitted = fit_image(pixels, geometry, GREEN)
    assert (geometry.resized, geometry.paste) == ((32, 64), (16, 0))
    assert (fitted[:, 16:48] == 9).all()
    assert (fitted[:, :16] == GREEN).all()
    assert (fitted[:, 48:] == GREEN).all()


def test_an_image_of_its_buckets_size_is_not_touched():
    pixels = decode_image(image_bytes((64, 48), 3), "a")
    geometry = Geometry((64, 48), (64, 48), (0, 0), (0, 0))
    assert fit_image(pixels, geometry, GREEN) is not None
    assert (fit_image(pixels, geometry, GREEN) == pixels).all()


def test_the_encoder_gets_minus_one_to_one_with_channels_first():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    signed = encoder_input(pixels)
    assert (signed.shape, signed.dtype) == ((3, 16, 16), np.float32)
    assert signed.min() == -1
    assert signed.max() == 1
    exact = np.arange(256, dtype=np.float64).reshape(16, 16) / 127.5 - 1
    np.testing.assert_allclose(signed[0], exact, rtol=0, atol=1.2e-7)  # two roundings near 1
