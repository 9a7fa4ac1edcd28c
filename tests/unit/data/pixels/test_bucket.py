"""Buckets, resize and crop, held against values of sd-scripts and against their meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.base.errors import DataError, OptionError
from raylora.data.pixels.bucket import Buckets, bucket_sizes, sd_scripts_crop

GOLDEN = Path(__file__).parents[3] / "golden"
SETTINGS = json.loads((GOLDEN / "buckets.json").read_text())["settings"]
NO_UPSCALE = json.loads((GOLDEN / "buckets_no_upscale.json").read_text())["settings"]

SIDES = st.integers(1, 12_000)


def buckets_of(setting: dict[str, Any]) -> Buckets:
    return Buckets(
        tuple(setting["max_reso"]),
        minimum=setting["min_size"],
        maximum=setting["max_size"],
        step=setting["reso_steps"],
        no_upscale=setting["no_upscale"],
    )


def name(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case["setting"].values())


@pytest.mark.parametrize("case", [case for case in SETTINGS if "images" in case], ids=name)
def test_set_choice_resize_and_crop_are_those_of_sd_scripts(case: dict[str, Any]):
    buckets = buckets_of(case["setting"])
    assert buckets.sizes == [tuple(size) for size in case["predefined_resos"]]
    for image in case["images"]:
        size, bucket = tuple(image["size"]), tuple(image["bucket"])
        geometry = buckets.place(size)
        assert (geometry.bucket, geometry.resized) == (bucket, tuple(image["resized"]))
        assert bucket[0] / bucket[1] - size[0] / size[1] == pytest.approx(
            image["ar_error"], abs=1e-12
        )
        assert sd_scripts_crop(bucket, size) == pytest.approx(image["crop_ltrb"], abs=1e-9)
        if "pixel_crop_xy" in image:
            assert geometry.crop == tuple(image["pixel_crop_xy"])


@pytest.mark.parametrize("case", [case for case in SETTINGS if "error" in case], ids=name)
def test_a_maximum_below_the_resolution_is_refused_as_in_sd_scripts(case: dict[str, Any]):
    with pytest.raises(OptionError, match=r"max_bucket_reso 960 is smaller .* Raise it to 1024"):
        buckets_of(case["setting"])


@pytest.mark.parametrize("case", NO_UPSCALE, ids=name)
def test_without_upscaling_sizes_are_those_of_sd_scripts(case: dict[str, Any]):
    buckets = buckets_of(case["setting"])
    for image in case["images"]:
        geometry = buckets.place(tuple(image["size"]))
        assert [geometry.bucket, geometry.resized] == [
            tuple(image["bucket"]),
            tuple(image["resized"]),
        ]


def test_no_image_gets_a_bucket_of_size_zero():  # sd-scripts makes one
    with pytest.raises(DataError, match="40x300 px is smaller than one step of 64 px"):
        Buckets((512, 512), no_upscale=True).place((40, 300))
    with pytest.raises(DataError, match="20000x20 px is smaller than one step"):
        Buckets((512, 512), no_upscale=True).place((20000, 20))


def test_a_strip_is_refused_before_it_needs_gigabytes():
    with pytest.raises(DataError, match="too long and thin"):
        Buckets((512, 512)).place((20_000, 1))


def test_a_minimum_above_the_resolution_is_refused():
    with pytest.raises(OptionError, match=r"min_bucket_reso 256 is larger .* Lower it to 128"):
        Buckets((128, 512))


def test_without_buckets_every_image_is_brought_to_the_resolution():
    buckets = Buckets((512, 384), enabled=False, no_upscale=True)
    geometry = buckets.place((100, 100))
    assert (geometry.bucket, geometry.resized, geometry.crop) == ((512, 384), (512, 512), (0, 64))


@given(
    st.integers(64, 1536),
    st.integers(64, 1536),
    st.sampled_from([8, 32, 64]),
    st.integers(64, 512),
    st.integers(512, 2048),
)
def test_no_bucket_exceeds_the_area_nor_leaves_the_range(
    width: int, height: int, step: int, minimum: int, maximum: int
):
    minimum, maximum = minimum // step * step, -(-maximum // step) * step
    if not minimum <= min(width, height) <= max(width, height) <= maximum:
        return
    for size in bucket_sizes((width, height), minimum, maximum, step):
        assert size[0] * size[1] <= width * height
        assert all(minimum <= side <= maximum and side % step == 0 for side in size)


@given(SIDES, SIDES, st.booleans(), st.sampled_from([8, 32, 64]))
def test_a_crop_lies_inside_the_resized_image(width: int, height: int, keep: bool, step: int):
    try:
        geometry = Buckets((512, 768), step=step, no_upscale=keep).place((width, height))
    except DataError:
        return
    for bucket, resized, crop in zip(geometry.bucket, geometry.resized, geometry.crop, strict=True):
        assert crop >= 0
        assert crop + bucket <= resized
    if not keep:  # cover: at least one side fits exactly
        assert any(b == r for b, r in zip(geometry.bucket, geometry.resized, strict=True))


@given(SIDES, SIDES, st.booleans())
def test_padding_shows_the_whole_image_inside_the_bucket(width: int, height: int, keep: bool):
    try:
        geometry = Buckets((512, 512), no_upscale=keep).place((width, height), "pad")
    except DataError:
        assert keep
        return
    (wide, high), (x, y) = geometry.resized, geometry.paste
    assert x >= 0
    assert y >= 0
    assert x + wide <= geometry.bucket[0]
    assert y + high <= geometry.bucket[1]
    assert geometry.crop == (0, 0)
    # The ratio survives up to the rounding of each side to a pixel.
    assert abs(wide / width * height - high) <= 1 + height / width


RESOLUTIONS = st.tuples(st.integers(8, 24), st.integers(8, 24)).map(
    lambda steps: (64 * steps[0], 64 * steps[1])
)


@given(SIDES, SIDES, RESOLUTIONS, st.booleans(), st.sampled_from([8, 32, 64]))
def test_the_bucket_of_any_image_is_a_whole_number_of_steps_within_the_area(
    width: int, height: int, resolution: tuple[int, int], keep: bool, step: int
):
    buckets = Buckets(resolution, maximum=2048, step=step, no_upscale=keep)
    for fit in ("crop", "pad"):
        try:
            bucket = buckets.place((width, height), fit).bucket
        except DataError:
            continue
        assert all(side > 0 and side % step == 0 for side in bucket)
        # Without upscaling sd-scripts rounds a side to a pixel before it floors it to a step.
        most = resolution[0] * resolution[1] * ((1 + 1 / min(bucket)) ** 2 if keep else 1)
        assert bucket[0] * bucket[1] <= most


def test_without_upscaling_a_thin_image_may_exceed_the_area_by_a_rounding():
    geometry = Buckets((896, 1280), step=8, no_upscale=True).place((180, 7320))
    assert geometry.bucket == (168, 6832)  # 1147776; the area is 1146880


@given(SIDES, SIDES, RESOLUTIONS, st.sampled_from([8, 32, 64]))
def test_without_upscaling_less_than_one_step_is_cut_and_nothing_is_enlarged(
    width: int, height: int, resolution: tuple[int, int], step: int
):
    # With upscaling there is no such bound: the nearest shape may be far from a thin image's.
    try:
        geometry = Buckets(resolution, step=step, no_upscale=True).place((width, height))
    except DataError:
        return
    for bucket, resized in zip(geometry.bucket, geometry.resized, strict=True):
        assert 0 <= resized - bucket < step
    # The side that is rounded to a pixel may gain half of one.
    assert geometry.resized[0] <= width + 0.5
    assert geometry.resized[1] <= height + 0.5


@given(SIDES, SIDES, RESOLUTIONS, st.sampled_from([8, 32, 64]))
def test_the_resized_image_covers_its_bucket_and_keeps_its_shape(
    width: int, height: int, resolution: tuple[int, int], step: int
):
    try:
        geometry = Buckets(resolution, maximum=2048, step=step).place((width, height))
    except DataError:
        return
    (wide, high), bucket = geometry.resized, geometry.bucket
    assert wide >= bucket[0]
    assert high >= bucket[1]
    assert abs(wide / width - high / height) <= 0.5 / width + 0.5 / height  # each side rounded


def test_nothing_in_the_golden_files_is_passed_over():
    assert len(SETTINGS) == 25
    assert sum("images" in case and len(case["images"]) == 32 for case in SETTINGS) == 24
    assert sum("error" in case for case in SETTINGS) == 1
    assert [len(case["images"]) for case in NO_UPSCALE] == [38] * 12
