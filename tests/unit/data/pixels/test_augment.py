"""What is drawn for a showing stays within its options, and is done to the pixels as drawn."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.base.errors import DataError
from raylora.base.seeds import draw_generator
from raylora.data.options import DataOptions, Native, SetOptions, resolve
from raylora.data.pixels.augment import Look, apply_look, draw_look, true_crop
from raylora.data.pixels.bucket import Geometry

WHITE = (255, 255, 255)
FACE = "cats/anna_300_200_80_100.png"  # centre (300, 200), 80 wide and 100 high


def options(**words: Any) -> SetOptions:
    data = DataOptions(folder="pictures", **{"resolution": 128, "bucket_reso_steps": 32, **words})
    return resolve(data, Native(512, 64))[0]


def looks(size: tuple[int, int], key: str = "a.png", count: int = 300, **words: Any) -> list[Look]:
    chosen = options(**words)
    return [
        draw_look(size, key, chosen, draw_generator(0, step, 0, "picture")) for step in range(count)
    ]


def plain(width: int, height: int, **changes: Any) -> Look:
    return Look(Geometry((width, height), (width, height), (0, 0), (0, 0)), **changes)


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_without_a_generator_the_crop_lies_in_the_middle_and_nothing_is_drawn():
    chosen = options(random_crop=True, color_aug=True, face_crop_aug_range=(1, 2))
    look = draw_look((640, 300), FACE, chosen, None, mirror=True)
    assert look == Look(chosen.buckets.place((640, 300)), flip=True)


def test_with_nothing_switched_on_a_generator_changes_nothing():
    assert set(looks((640, 300))) == {Look(options().buckets.place((640, 300)))}


def test_the_same_key_draws_the_same_look():
    words = {"random_crop": True, "color_aug": True}
    assert looks((640, 300), count=20, **words) == looks((640, 300), count=20, **words)


def test_switching_colour_on_moves_no_crop():
    crops = [look.geometry for look in looks((640, 300), random_crop=True)]
    assert crops == [look.geometry for look in looks((640, 300), random_crop=True, color_aug=True)]


def test_a_random_crop_reaches_every_offset_as_often():
    drawn = looks((640, 400), count=4000, random_crop=True, enable_bucket=False)
    assert {look.geometry.resized for look in drawn} == {(205, 128)}
    lefts = np.bincount([look.geometry.crop[0] for look in drawn], minlength=78)
    assert len(lefts) == 78  # 0 to the excess of 77
    # 4000 draws over 78 places: 51 each; 6 standard deviations of a count are 43.
    assert lefts.min() > 8
    assert lefts.max() < 95
    assert {look.geometry.crop[1] for look in drawn} == {0}


def test_an_unknown_size_is_refused_with_the_reason():
    with pytest.raises(DataError, match="smaller than one step"):
        draw_look((20, 20), "a", options(bucket_no_upscale=True), None)


def test_a_face_takes_the_share_of_the_bucket_that_the_range_says():
    drawn = looks((640, 400), FACE, enable_bucket=False, face_crop_aug_range=(1.5, 2.5))
    scales = np.array([look.geometry.resized[0] / 640 for look in drawn])
    # 128 / (100 * 2.5) and 128 / (100 * 1.5), each side rounded to a pixel.
    assert scales.min() == pytest.approx(0.512, abs=0.01)
    assert scales.max() == pytest.approx(0.8533, abs=0.01)
    for look, scale in zip(drawn, scales, strict=True):
        (left, top), jitter = look.geometry.crop, 100 * scale / 20
        assert abs(left + 64 - 300 * scale) <= jitter + 1.5
        assert abs(top + 64 - 200 * scale) <= jitter + 1.5
    assert len({look.geometry.crop for look in drawn}) > 100


def test_a_range_of_one_number_draws_nothing():
    drawn = looks((640, 400), FACE, enable_bucket=False, face_crop_aug_range=(2, 2))
    place = Geometry((128, 128), (410, 256), (128, 64), (0, 0))
    assert {look.geometry for look in drawn} == {place}


def test_a_face_is_enlarged_only_as_far_as_the_bucket_needs():
    small = looks((640, 400), "a_300_200_9_9.png", enable_bucket=False, face_crop_aug_range=(1, 2))
    assert {look.geometry.resized for look in small} == {(640, 400)}
    tiny = looks((100, 80), "a_50_40_9_9.png", enable_bucket=False, face_crop_aug_range=(1, 2))
    assert {look.geometry.resized for look in tiny} == {(160, 128)}


def test_a_face_larger_than_its_share_still_covers_the_bucket():
    drawn = looks((640, 400), "a_9_9_400_400.png", enable_bucket=False, face_crop_aug_range=(1, 2))
    assert {(look.geometry.resized, look.geometry.crop) for look in drawn} == {((205, 128), (0, 0))}


def test_a_random_crop_around_a_face_is_mostly_near_it():
    words = {"face_crop_aug_range": (2, 2), "random_crop": True, "enable_bucket": False}
    drawn = looks((640, 400), "a_480_200_80_100.png", count=2000, **words)
    off = np.array([look.geometry.crop[0] + 64 - 307 for look in drawn])
    assert (off.min(), off.max()) == (-243, 39)  # the edges, where far draws are clamped
    # Triangular over +-307: less than a quarter to the left with probability 23/32; 5 deviations.
    assert np.mean(off > -307 / 4) == pytest.approx(23 / 32, abs=0.05)


@pytest.mark.parametrize(
    "key",
    ["a.png", "a_1_2_3.png", "a_b_200_80_100.png", "a_300_200_0_0.png", "a_3_2_8_10_x.png"],
)
def test_a_name_without_a_face_is_cut_in_the_middle(key: str):
    drawn = looks((640, 400), key, count=5, face_crop_aug_range=(1, 2))
    assert {look.geometry for look in drawn} == {options().buckets.place((640, 400))}


@given(
    *[st.integers(1, 3000)] * 2,
    *[st.integers(0, 999_999)] * 4,
    st.floats(0.01, 50),
    st.floats(1, 9),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_whatever_a_name_says_the_crop_lies_inside_the_resized_image(
    width: int,
    height: int,
    x: int,
    y: int,
    face_width: int,
    face_height: int,
    low: float,
    factor: float,
    random: bool,
    keep: bool,
    buckets: bool,
):
    chosen = options(
        face_crop_aug_range=(low, low * factor),
        random_crop=random,
        bucket_no_upscale=keep,
        enable_bucket=buckets,
    )
    key = f"a_{x}_{y}_{face_width}_{face_height}.png"
    try:
        place = draw_look((width, height), key, chosen, draw_generator(0, x, y, "picture")).geometry
    except DataError:
        return
    for whole, part, start in zip(place.resized, place.bucket, place.crop, strict=True):
        assert 0 <= start <= whole - part
    larger = max(side / old for side, old in zip(place.resized, (width, height), strict=True))
    cover = max(side / old for side, old in zip(place.bucket, (width, height), strict=True))
    assert larger <= max(1, cover) + 0.5 / min(width, height) + 1e-9


def test_a_third_of_the_showings_are_coloured_half_by_hue_and_half_by_gamma():
    drawn = looks((640, 400), count=5000, color_aug=True)
    hues = np.array([look.hue for look in drawn if look.hue])
    gammas = np.array([look.gamma for look in drawn if look.gamma != 1])
    # 5 standard deviations of a share of 0.165 in 5000.
    assert len(hues) / 5000 == pytest.approx(0.165, abs=0.027)
    assert len(gammas) / 5000 == pytest.approx(0.165, abs=0.027)
    assert not any(look.hue and look.gamma != 1 for look in drawn)
    assert -8 <= hues.min() < -7.8
    assert 7.8 < hues.max() <= 8
    assert 0.95 <= gammas.min() < 0.951
    assert 1.049 < gammas.max() <= 1.05


@pytest.mark.parametrize("degrees", [-8.0, 3.3, 8.0, 90.0])
def test_a_hue_shift_is_that_of_hsv(degrees: float):
    pixels = noise(16, 12)
    pixels[0] = pixels[0, :, :1]  # greys have no hue
    shown = apply_look(pixels, plain(16, 12, hue=degrees), WHITE)
    for before, after in zip(pixels.reshape(-1, 3), shown.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before / 255.0)
        exact = np.array(colorsys.hsv_to_rgb((hue + degrees / 180) % 1, saturation, value)) * 255
        assert np.abs(exact - after).max() < 0.501  # rounding, and float32 at its edge


def test_gamma_is_a_power_of_the_share_of_white():
    pixels = noise(16, 12)
    shown = apply_look(pixels, plain(16, 12, gamma=1.05), WHITE)
    np.testing.assert_array_equal(shown, np.rint(255 * (pixels / 255.0) ** 1.05).astype(np.uint8))
    assert shown.mean() < pixels.mean()


def test_a_flip_mirrors_what_was_cut():
    pixels = noise(200, 100)
    place = Geometry((64, 64), (128, 64), (20, 0), (0, 0))
    upright = apply_look(pixels, Look(place), WHITE)
    mirrored = apply_look(pixels, Look(place, flip=True), WHITE)
    np.testing.assert_array_equal(mirrored, upright[:, ::-1])
    assert (mirrored != upright).any()


def test_the_crop_condition_is_that_of_the_mirrored_picture():
    pixels = noise(200, 100)
    place = Geometry((64, 64), (200, 100), (20, 7), (0, 0))
    look = Look(place, flip=True)
    left, top = true_crop(look)
    cut = pixels[:, ::-1][top : top + 64, left : left + 64]
    np.testing.assert_array_equal(apply_look(pixels, look, WHITE), cut)
    assert true_crop(Look(place)) == (20, 7)


def test_a_padded_picture_has_no_crop():
    place = options(enable_bucket=False).buckets.place((100, 640), "pad")
    assert place.resized[0] < place.bucket[0]
    assert true_crop(Look(place)) == true_crop(Look(place, flip=True)) == (0, 0)


def test_interpolation_is_the_one_that_was_chosen():
    pixels = noise(64, 64)
    small, large = (Look(Geometry((n, n), (n, n), (0, 0), (0, 0))) for n in (32, 128))
    for look, same in ((small, "area"), (large, "lanczos")):
        default = apply_look(pixels, look, WHITE)
        np.testing.assert_array_equal(default, apply_look(pixels, look, WHITE, same))
    nearest = apply_look(pixels, large, WHITE, "nearest")
    np.testing.assert_array_equal(nearest, pixels.repeat(2, 0).repeat(2, 1))
    chosen = ("lanczos", "nearest", "bilinear", "bicubic", "area")
    seen = {apply_look(pixels, small, WHITE, name).tobytes() for name in chosen}
    assert len(seen) == 5
    for name, same in (("linear", "bilinear"), ("cubic", "bicubic"), ("box", "area")):
        assert apply_look(pixels, small, WHITE, name).tobytes() in seen
        np.testing.assert_array_equal(
            apply_look(pixels, small, WHITE, name), apply_look(pixels, small, WHITE, same)
        )
