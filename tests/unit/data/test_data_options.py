"""The data section: what a word holds for, defaults, and what is told when a job is read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from raylora.base.errors import JobError, OptionError
from raylora.data.options import DataOptions, Native, SetOptions, SetWords, resolve
from raylora.job import Job, job_from, load_job, with_overrides

SD15 = Native(512, 64)
# One value for each word that is not its default.
VALUES: dict[str, Any] = {
    "folder": "images",
    "recursive": True,
    "tars": True,
    "manifest": "list.jsonl",
    "repeats": 3,
    "is_reg": True,
    "output_preservation": True,
    "group": 2,
    "validation_split": 0.25,
    "validation_seed": 7,
    "resolution": (640, 320),
    "enable_bucket": False,
    "min_bucket_reso": 128,
    "max_bucket_reso": 1536,
    "bucket_reso_steps": 32,
    "bucket_no_upscale": True,
    "fit": "pad",
    "background": "#123456",
    "resize_interpolation": "bicubic",
    "caption_extensions": (".cap",),
    "class_tokens": "thing",
    "default_caption": "any",
    "caption_prefix": "before",
    "caption_suffix": "after",
    "enable_wildcard": True,
    "shuffle_caption": True,
    "caption_separator": ";",
    "keep_tokens": 2,
    "keep_tokens_separator": "|||",
    "secondary_separator": ";;;",
    "caption_dropout_rate": 0.5,
    "caption_dropout_every_n_epochs": 4,
    "caption_tag_dropout_rate": 0.125,
    "token_warmup_min": 2,
    "token_warmup_step": 0.5,
    "flip_aug": True,
    "color_aug": True,
    "random_crop": True,
    "face_crop_aug_range": (1.0, 2.0),
    "alpha_mask": True,
    "mask_folder": "masks",
}
# Of these, what else cannot stand together.
HARMONIOUS: dict[str, Any] = {
    "fit": "crop",
    "alpha_mask": False,
    "is_reg": False,
    "output_preservation": False,
    "enable_bucket": True,
    "bucket_no_upscale": False,
}
# What a word cannot stand without.
BESIDE: dict[str, dict[str, Any]] = {"output_preservation": {"is_reg": True}}
BUCKET_SIDES = ("min_bucket_reso", "max_bucket_reso")
# Null in a set stands for what suits the family and the resolution.
SIZES = ("resolution", "bucket_reso_steps", *BUCKET_SIDES)


def job_of(data: dict[str, Any], **sections: Any) -> Job:
    tree = {
        "name": "bare",
        "family": {"kind": "sd15", "weights": "base"},
        "training": {"steps": 1},
        "data": data,
    }
    return job_from({**tree, **sections})


def problems_of(data: dict[str, Any], **sections: Any) -> list[str]:
    with pytest.raises(JobError) as caught:
        job_of(data, **sections)
    return caught.value.problems


def sets_of(*sets: dict[str, Any], **section: Any) -> tuple[SetOptions, ...]:
    return resolve(DataOptions.model_validate({**section, "sets": sets}), SD15)


# -- what a word holds for


def test_every_word_of_a_set_has_a_value_here():
    assert set(VALUES) == set(SetWords.model_fields)


@pytest.mark.parametrize("word", VALUES)
def test_a_word_of_the_section_holds_for_sets_that_lack_it_and_only_for_these(word: str):
    value, default = VALUES[word], SetWords.model_fields[word].default
    own = "other" if word == "folder" else default
    beside = {"folder": "other", **BESIDE.get(word, {})}
    (alone,) = sets_of(beside)
    without, kept = sets_of({}, {**beside, word: own}, **{**beside, word: value})
    assert getattr(without, word) == value != getattr(alone, word)
    assert kept == alone
    if word not in SIZES:
        assert getattr(kept, word) == own
    for other in set(VALUES) - {word, *BUCKET_SIDES}:
        assert getattr(without, other) == getattr(alone, other)
    lacks, has = sets_of(beside, {**beside, word: value})
    assert lacks == alone
    assert getattr(has, word) == value


def test_the_section_alone_is_one_set():
    (one,) = resolve(DataOptions(folder="a", repeats=2, flip_aug=True), SD15)
    assert (one.folder, one.repeats, one.flip_aug) == ("a", 2, True)
    assert one == sets_of({"folder": "a"}, repeats=2, flip_aug=True)[0]


def test_null_in_a_set_takes_the_section_s_word_away():
    words = {"caption_prefix": "p", "resolution": 640, "mask_folder": "m"}
    keeps, lacks = sets_of({}, dict.fromkeys(words), folder="a", **words)
    assert (keeps.caption_prefix, keeps.resolution, keeps.mask_folder) == ("p", (640, 640), "m")
    assert (lacks.caption_prefix, lacks.resolution, lacks.mask_folder) == (None, (512, 512), None)


def test_words_of_the_whole_section_are_no_words_of_a_set():
    for word in ("variants", "cache", "prior_loss_weight", "max_bad", "toml", "sets", "plain"):
        assert problems_of({"sets": [{"folder": "a", word: 1}]})[0].startswith(
            f"data.sets.0.{word}: no such option."
        )
    assert problems_of({"folder": "a", "plain": True})[0].startswith("data.plain: no such option.")


def test_a_set_that_is_held_out_draws_nothing_and_keeps_its_size():
    (one,) = resolve(DataOptions(**{**VALUES, **HARMONIOUS}), SD15)
    held = one.held_out("elsewhere")
    assert held.folder == "elsewhere"
    assert (held.repeats, held.validation_split, held.is_reg, held.manifest) == (
        1,
        0.0,
        False,
        None,
    )
    assert not any((held.draws_pictures, held.draws_texts, held.masked))
    assert held.buckets.sizes == one.buckets.sizes
    assert (held.caption_prefix, held.fit) == ("before", "crop")
    assert one.held_out().folder == "images"
    assert one.draws_pictures
    (reg,) = sets_of({"folder": "a", "is_reg": True, "output_preservation": True})
    assert reg.output_preservation
    assert not reg.held_out("elsewhere").output_preservation


# -- there and back


def test_a_section_survives_being_written_and_read():
    for data in (
        DataOptions(folder="a"),
        DataOptions(**{**VALUES, **HARMONIOUS}, variants=3, cache="c", order_seed=1),
        DataOptions.model_validate(
            {"resolution": [640, 320], "sets": [{"folder": "a"}, {"resolution": 64, "folder": "b"}]}
        ),
    ):
        for written in (data.model_dump(), json.loads(json.dumps(data.model_dump(mode="json")))):
            again = DataOptions.model_validate(written)
            assert again == data
            assert again.model_dump(mode="json") == data.model_dump(mode="json")
            assert resolve(again, SD15) == resolve(data, SD15)
            assert resolve(again, Native(1024, 32)) == resolve(data, Native(1024, 32))
        assert pickle.loads(pickle.dumps(resolve(data, SD15))) == resolve(data, SD15)


def test_what_is_set_later_reaches_the_sets_that_do_not_write_it():
    job = job_of({"sets": [{"folder": "a"}, {"folder": "b", "resolution": 320}]})
    for _ in range(2):  # a job that was read from a job's own record, too
        later = with_overrides(job, {"data.resolution": 640, "data.flip_aug": True})
        assert [one.resolution for one in later.sets] == [(640, 640), (320, 320)]
        assert [one.max_bucket_reso for one in later.sets] == [1280, 640]
        assert [one.flip_aug for one in later.sets] == [True, True]
        again = with_overrides(later, {"data.flip_aug": False})
        assert [one.flip_aug for one in again.sets] == [False, False]
        job = job_from(job.plain())
    assert job.plain() == job_of(job.plain()["data"]).plain()


TOML = """
[general]
enable_bucket = true
caption_prefix = "p"

[[datasets]]
resolution = 256
[[datasets.subsets]]
image_dir = "a"
num_repeats = 2

[[datasets]]
[[datasets.subsets]]
image_dir = "b"
caption_prefix = ""
"""


def test_a_data_set_file_is_read_once(tmp_path: Path):
    path = tmp_path / "sets.toml"
    path.write_text(TOML)
    job = job_of({"toml": str(path), "keep_tokens": 1})
    path.unlink()
    assert [(one.folder, one.repeats, one.group) for one in job.sets] == [("a", 2, 0), ("b", 1, 1)]
    assert [one.resolution for one in job.sets] == [(256, 256), (512, 512)]
    assert [one.caption_prefix for one in job.sets] == ["p", None]
    assert [one.keep_tokens for one in job.sets] == [1, 1]
    assert {one.enable_bucket for one in job.sets} == {True}
    assert job.data.toml is None
    again = job_from(json.loads(json.dumps(job.plain())))
    assert again.sets == job.sets
    assert again.fingerprint() == job.fingerprint()
    later = with_overrides(again, {"data.resolution": 320, "data.keep_tokens": 2})
    assert [one.resolution for one in later.sets] == [(256, 256), (320, 320)]
    assert [one.keep_tokens for one in later.sets] == [2, 2]


def test_words_of_a_job_come_before_the_defaults_of_sd_scripts(tmp_path: Path):
    path = tmp_path / "sets.toml"
    path.write_text(TOML.replace("enable_bucket = true", ""))
    assert {one.enable_bucket for one in job_of({"toml": str(path)}).sets} == {False}
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: x\nfamily: {{kind: sd15, weights: base}}\ntraining: {{steps: 1}}\n"
        f"data: {{toml: {path}}}\n"
    )
    overridden = load_job(job, ["data.enable_bucket=true", "data.repeats=5"])
    assert {one.enable_bucket for one in overridden.sets} == {True}
    assert [one.repeats for one in overridden.sets] == [2, 5]


# -- defaults


@pytest.mark.parametrize(
    ("resolution", "native", "size", "sides"),
    [
        (None, SD15, (512, 512), (256, 1024, 64)),
        (None, Native(1024, 32), (1024, 1024), (256, 2048, 32)),
        (256, SD15, (256, 256), (128, 512, 64)),
        ((768, 384), SD15, (768, 384), (192, 1536, 64)),
        (64, Native(64, 8), (64, 64), (32, 128, 8)),
        (8, Native(64, 8), (8, 8), (8, 16, 8)),
    ],
)
def test_buckets_go_by_the_resolution_where_nothing_is_said(
    resolution: Any, native: Native, size: tuple[int, int], sides: tuple[int, int, int]
):
    (one,) = resolve(DataOptions(folder="a", resolution=resolution), native)
    assert one.resolution == size
    assert (one.min_bucket_reso, one.max_bucket_reso, one.bucket_reso_steps) == sides


def test_a_side_that_is_given_leaves_the_other_to_the_resolution():
    (one,) = resolve(DataOptions(folder="a", resolution=640, min_bucket_reso=320), SD15)
    assert (one.min_bucket_reso, one.max_bucket_reso) == (320, 1280)


# -- what is told

CHECKS: list[tuple[dict[str, Any], str]] = [
    ({"folder": None}, "folder: missing. Give the folder of the images, or a manifest."),
    ({"resolution": 4}, "resolution 4x4 is below 8 px."),
    ({"resolution": 0}, "resolution 0x0 is below 8 px."),
    ({"resolution": [512, -8]}, "resolution 512x-8 is below 8 px."),
    ({"resolution": -8}, "resolution -8x-8 is below 8 px."),
    (
        {"resolution": 500, "enable_bucket": False},
        "resolution 500x500 is not a multiple of 8 px, as it has to be without buckets. Change it, "
        "or set enable_bucket: true.",
    ),
    (
        {"fit": "pad", "random_crop": True},
        "fit: pad shows all of an image, so random_crop has nothing to cut.",
    ),
    (
        {"fit": "pad", "face_crop_aug_range": [1, 2]},
        "fit: pad shows all of an image, so face_crop_aug_range has nothing to cut.",
    ),
    (
        {"face_crop_aug_range": [2, 1]},
        "face_crop_aug_range [2.0, 1.0]: the first is the lower one.",
    ),
    ({"alpha_mask": True, "mask_folder": "m"}, "alpha_mask and mask_folder: give one of them."),
    (
        {"output_preservation": True},
        "output_preservation is for regularisation images, and these are trained for what they "
        "show. Set is_reg: true, or leave output_preservation out.",
    ),
    (
        {"max_bucket_reso": 320},
        "max_bucket_reso 320 is smaller than a side of resolution 512x512. Raise it to 512, or "
        "lower resolution.",
    ),
    (
        {"min_bucket_reso": 640},
        "min_bucket_reso 640 is larger than a side of resolution 512x512. Lower it to 512, raise "
        "resolution, or set enable_bucket: false.",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), CHECKS, ids=lambda value: str(value)[:40])
def test_what_cannot_be_trained_is_told_with_its_place(words: dict[str, Any], sentence: str):
    assert problems_of({"folder": "a", **words}) == [f"data.{sentence}"]
    broken = {"folder": "b", **words}
    section = {"folder": "a"} if words != {"folder": None} else {}
    sets = [{"folder": "a"}, broken]
    assert problems_of({**section, "sets": sets}) == [f"data.sets.1.{sentence}"]
    with pytest.raises(OptionError) as caught:
        sets_of(*sets)
    assert str(caught.value) == f"data.sets.1.{sentence}"


MASKS = {"loss": {"mask": "plain"}}


@pytest.mark.parametrize(
    ("data", "sections", "sentence"),
    [
        (
            {"token_warmup_step": 10},
            {},
            "data.token_warmup_step is 10: how many tags are shown depends on the step, and cached "
            "captions do not. Add data.cache_text: false, which encodes captions as they are "
            "shown.",
        ),
        (
            {"validation_split": 0.1},
            {"validation": {"folder": "held"}},
            "data.validation_split and validation.folder: give one of them.",
        ),
        (
            {"validation_seed": 3},
            {},
            "data.validation_seed chooses which images data.validation_split holds out, which is "
            "not given. Give it, or leave the seed out.",
        ),
        (
            {"prior_loss_weight": 0.5},
            {},
            "data.prior_loss_weight is 0.5, and no set has is_reg: true. Mark the regularisation "
            "images, or leave it out.",
        ),
        (
            {},
            MASKS,
            "loss.mask is plain, and no set has masks. Give data.alpha_mask or data.mask_folder, "
            "or leave it out.",
        ),
        (
            {"variants": 4},
            {},
            "data.variants is 4, and nothing is drawn ahead of training: add what is to be drawn "
            "(shuffle_caption, flip_aug, random_crop, …), or leave it out.",
        ),
        (
            {"variants": 4, "shuffle_caption": True, "cache_text": False},
            {},
            "data.variants is 4, and nothing is drawn ahead of training: add what is to be drawn "
            "(shuffle_caption, flip_aug, random_crop, …), or leave it out.",
        ),
        (
            {"toml": "x.toml", "sets": [{"folder": "b"}]},
            {},
            "data.toml and data.sets: give one of them.",
        ),
        ({"toml": "x.toml"}, {}, "data.toml and data.folder: give one of them."),
    ],
)
def test_words_that_do_not_agree_are_told_when_the_job_is_read(
    data: dict[str, Any], sections: dict[str, Any], sentence: str
):
    assert problems_of({"folder": "a", **data}, **sections) == [sentence]


@pytest.mark.parametrize(
    ("data", "sections"),
    [
        ({"token_warmup_step": 10, "cache_text": False}, {}),
        ({"token_warmup_step": 0.1, "cache": "none"}, {}),
        ({"prior_loss_weight": 0.5, "sets": [{}, {"folder": "r", "is_reg": True}]}, {}),
        ({"sets": [{}, {"mask_folder": "m"}]}, MASKS),
        ({"variants": 4, "shuffle_caption": True}, {}),
        ({"variants": 4, "flip_aug": True, "cache_text": False}, {}),
        ({"variants": 4, "sets": [{}, {"random_crop": True}]}, {}),
        ({"validation_split": 0.1}, {}),
        ({"validation_seed": 3, "sets": [{}, {"validation_split": 0.1}]}, {}),
        ({}, {"validation": {"folder": "held"}}),
    ],
)
def test_words_that_agree_are_let_pass(data: dict[str, Any], sections: dict[str, Any]):
    assert job_of({"folder": "a", **data}, **sections).sets[0].folder == "a"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"resolutoin": 1}, "resolutoin: no such option. Did you mean 'resolution'?"),
        ({"repeats": 0}, "repeats is 0: input should be greater than or equal to 1."),
        ({"validation_split": 1.0}, "validation_split is 1.0: input should be less than 1."),
        (
            {"bucket_reso_steps": 20},
            "bucket_reso_steps is 20: input should be a multiple of 8.",
        ),
        (
            {"caption_extensions": ["txt"]},
            "caption_extensions: 'txt' does not begin with a dot. Write '.txt'.",
        ),
        ({"background": "white"}, "background is 'white': string should match pattern"),
        ({"resolution": "big"}, "resolution is 'big': input should be a valid integer"),
    ],
)
def test_a_wrong_word_of_a_set_is_told_with_its_place(words: dict[str, Any], sentence: str):
    (alone,) = problems_of({"folder": "a", **words})
    assert alone.startswith(f"data.{sentence}")
    (of_set,) = problems_of({"sets": [{"folder": "a"}, {"folder": "b", **words}]})
    assert of_set.startswith(f"data.sets.1.{sentence}")


def test_a_broken_data_set_file_is_told_with_its_place(tmp_path: Path):
    path = tmp_path / "sets.toml"
    assert problems_of({"toml": str(path)})[0].startswith("data.toml: ")
    path.write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nnum_repeets = 2\n")
    (problem,) = problems_of({"toml": str(path)})
    assert problem.startswith(f"data.toml: {path}: datasets[0].subsets[0].num_repeets: no such key")


def test_options_cannot_be_changed_in_place():
    data = DataOptions(folder="a")
    with pytest.raises(ValidationError, match="frozen"):
        data.folder = "b"  # type: ignore[misc]
