"""Decoding at reduced scale, masks, and the way to a bucket; `test_zoo.py` has the odd files."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
from fuzz.decode import damaged, read_all, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from imagezoo import (
    JXL_BOMB,
    JXL_BOXED,
    JXL_PLAIN,
    greys,
    jpeg,
    oriented,
    profiles,
    quarters,
    saved,
    stored_for,
)
from PIL import Image, ImageCms

from raylora.base.errors import DataError
from raylora.data.pixels import decode
from raylora.data.pixels.bucket import Buckets, Geometry, Size
from raylora.data.pixels.decode import (
    decode_image,
    decode_mask,
    decode_with_alpha,
    decoder_name,
    encoder_input,
    fit_image,
    image_suffixes,
    read_size,
)

GREEN = (0, 255, 0)


def photo(width: int, height: int) -> np.ndarray:
    """Slopes, edges and grain, as in a photograph: most of its power in low frequencies."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / 100
    picture = np.stack([np.sin(x + y), np.cos(x * y), np.sin(3 * y)], axis=2) * 80 + 128
    picture[height // 3 : height // 2, width // 4 : width // 2] = (220, 60, 30)
    picture += draw.normal(0, 4, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def to_bucket(pixels: np.ndarray, resized: Size) -> np.ndarray:
    return fit_image(pixels, Geometry(resized, resized, (0, 0), (0, 0)), GREEN).astype(int)


@pytest.mark.parametrize(
    ("target", "decoded"),
    [
        ((512, 320), (1024, 640)),
        ((256, 160), (512, 320)),
        ((128, 80), (256, 160)),
        ((64, 40), (256, 160)),
        ((257, 160), (1024, 640)),
        ((256, 161), (1024, 640)),
        ((513, 320), (2048, 1280)),
        ((3000, 2000), (2048, 1280)),
    ],
)
def test_a_large_jpeg_is_decoded_at_twice_its_target_or_more(target: Size, decoded: Size):
    data = jpeg(Image.new("RGB", (2048, 1280), GREEN))
    assert decode_image(data, "a", target=target).shape[1::-1] == decoded
    assert decode_image(data, "a").shape[1::-1] == (2048, 1280)


@pytest.mark.parametrize("number", range(1, 9))
def test_a_target_is_that_of_the_upright_picture(number: int):
    upright = quarters(1024, 256)
    data = jpeg(stored_for(number, upright), exif=oriented(number))
    small = decode_image(data, "a", target=(128, 32))
    assert small.shape == (64, 256, 3)
    # What quality 95 rounds; the few pixels of the seams may be further off.
    assert np.percentile(np.abs(small.astype(int) - quarters(256, 64)), 98) <= 4
    flat = decode_image(data, "a", target=(128, 64))  # its height allows no more than a half
    assert flat.shape == (128, 512, 3)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP"])
def test_a_target_changes_nothing_of_other_formats(form: str):
    data = saved(photo(400, 300), form)
    whole = decode_image(data, "a")
    np.testing.assert_array_equal(decode_image(data, "a", target=(20, 15)), whole)


@pytest.mark.parametrize("scale", [4, 8, 16])
def test_reduced_decoding_changes_the_resized_picture_by_less_than_a_level(scale: int):
    size = (1600, 1200)
    target = (size[0] // scale, size[1] // scale)
    data = jpeg(photo(*size), quality=90, subsampling=2)
    whole = to_bucket(decode_image(data, "a"), target)
    reduced = to_bucket(decode_image(data, "a", target=target), target)
    off = np.abs(whole - reduced)
    # The decoder halves by cutting off DCT frequencies, not by averaging, so that the pixels beside
    # an edge differ; on the mean it is no more than the two roundings to whole levels.
    assert 0 < off.mean() < 1
    assert np.percentile(off, 99) <= 6


def test_the_alpha_channel_is_turned_with_its_picture():
    upright = np.dstack([quarters(40, 20), np.full((20, 40), 255, np.uint8)])
    upright[:10, :20, 3] = 7
    data = saved(stored_for(6, upright), "WEBP", lossless=True, exif=oriented(6))
    pixels, alpha = decode_with_alpha(data, "a")
    assert pixels.shape == (20, 40, 3)
    np.testing.assert_array_equal(alpha, upright[..., 3])


def test_a_picture_without_transparency_has_no_alpha():
    assert decode_with_alpha(saved(quarters()), "a")[1] is None


def test_a_mask_is_the_red_channel_upright():
    upright = quarters(40, 20)
    data = saved(stored_for(8, upright), exif=oriented(8))
    np.testing.assert_array_equal(decode_mask(data, "m"), upright[..., 0])


def test_the_clear_parts_of_a_mask_count_as_black():
    mask = np.full((4, 6, 4), 255, np.uint8)
    mask[:, :3, 3] = 0
    np.testing.assert_array_equal(decode_mask(saved(mask), "m")[0], [0, 0, 0, 255, 255, 255])


def test_a_masks_colour_profile_is_passed_over():
    data = profiles()["grey profile"].data
    np.testing.assert_array_equal(decode_mask(data, "m"), greys())
    assert (decode_image(data, "m")[..., 0] != greys()).any()


def test_an_image_in_srgb_is_not_converted(monkeypatch: pytest.MonkeyPatch):
    convert, sizes = ImageCms.applyTransform, []

    def count(image: Image.Image, *rest: object) -> Image.Image | None:
        sizes.append(image.size)
        return convert(image, *rest)

    monkeypatch.setattr(ImageCms, "applyTransform", count)
    decode_image(profiles()["sRGB of another maker"].data, "a")
    assert sizes == [(36, 6)]  # the colours that are tried
    decode_image(profiles()["wide profile"].data, "a")
    assert sizes[1:] == [(36, 6), (12, 8)]


def test_a_mask_that_cannot_be_read_is_refused_by_name():
    with pytest.raises(DataError, match=r"^m\.png: not an image that can be read, but text$"):
        decode_mask(b"hello", "m.png")


def test_the_size_of_a_png_is_read_without_its_pixels():
    data = saved(photo(600, 400))
    assert read_size(data[:200], "a") == (600, 400)
    with pytest.raises(DataError, match="truncated"):
        decode_image(data[:200], "a")


@pytest.fixture
def forget() -> Iterator[None]:
    """What is installed is looked up anew, before and after."""
    for known in (decode._formats, image_suffixes):
        known.cache_clear()
    yield
    for known in (decode._formats, image_suffixes):
        known.cache_clear()


BASE = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def test_endings_are_those_that_can_be_read(forget: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)  # cannot be imported
    monkeypatch.delitem(Image.OPEN, "JXL", raising=False)
    monkeypatch.setattr("PIL.features.check", lambda name: name == "avif")
    assert image_suffixes() == BASE | {".avif"}
    image_suffixes.cache_clear()
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    assert image_suffixes() == BASE
    assert " with " not in decoder_name()


def test_jpeg_xl_is_read_once_its_plugin_is_installed(
    forget: None, monkeypatch: pytest.MonkeyPatch
):
    shown = Image.new("RGB", (12, 8))
    shown.format = "JXL"
    monkeypatch.setitem(sys.modules, "pillow_jxl", types.ModuleType("pillow_jxl"))
    monkeypatch.setitem(Image.OPEN, "JXL", (lambda *_: shown, lambda data: True))
    assert ".jxl" in image_suffixes()
    assert decoder_name().endswith(" with jxl")
    assert read_size(JXL_PLAIN, "a") == (12, 8)
    with pytest.raises(DataError, match="1073741824x1073741824 px is more than 89 million"):
        read_size(JXL_BOMB, "a")


@pytest.mark.parametrize(
    ("start", "size"),
    [  # made by pillow-jxl-plugin 1.3.8
        ("ff0a01412408000100ac00", (12, 8)),
        ("ff0af881ce0788040802", (1000, 64)),
        ("ff0a047102dd2e100908", (3000, 20001)),
        (JXL_BOXED.hex(), (12, 8)),
    ],
)
def test_the_size_of_a_jpeg_xl_is_in_its_first_bits(start: str, size: Size):
    assert decode._jxl_size(bytes.fromhex(start)) == size


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
@pytest.mark.filterwarnings("ignore")
def test_no_damage_to_a_file_raises_anything_but_a_data_error(number: int):
    assert read_all(damaged(FILES, 1, number)) in ("shown", "refused")


FILES = seeds()


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
    pixels = photo(64, 48)
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
