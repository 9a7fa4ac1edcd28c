"""After a change exactly what it touches is read and made again, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datafolders import (
    FACTS,
    Counted,
    NumpyEncoder,
    as_bytes,
    fill_folder,
    image_bytes,
    sets_of,
    small_options,
)

from raylora.base.storage import open_storage
from raylora.data.dataset import Dataset, load_dataset, prepare, run_item

COUNT = 5
IMAGES = [f"image-{number:04d}.png" for number in range(COUNT)]
TEXTS = [f"image-{number:04d}.txt" for number in range(COUNT)]
CROPPED = {"random_crop": True, "enable_bucket": False, "resolution": 64}
SHUFFLED = {"shuffle_caption": True}
NOTHING: dict[str, int] = {}


class Made(NamedTuple):
    """What a run did."""

    pictures: int
    captions: int
    reads: dict[str, int]
    """Of image and caption files."""
    mask_reads: dict[str, int] = NOTHING


class Place(NamedTuple):
    """A data folder with masks, and its cache."""

    folder: Path
    masks: Path
    cache_url: str

    def run(
        self,
        words: dict[str, Any],
        facts: dict[str, Any] | None = None,
        *,
        rehash: bool = False,
        workers: int = 1,
    ) -> tuple[Dataset, Made]:
        """Bring the cache up to date; what was made, and which sources were read for it."""
        words = {word: str(self.masks) if word == "mask_folder" else v for word, v in words.items()}
        data = small_options(self.folder, **words)
        with pytest.MonkeyPatch.context() as patch:
            counted, encoder = Counted(patch), NumpyEncoder()
            plan = prepare(
                data,
                sets_of(data),
                self.cache_url,
                rehash=rehash,
                workers=workers,
                **{**FACTS, **(facts or {})},
            )
            for item in plan.items:
                run_item(plan.facts, item, encoder)
            dataset = load_dataset(plan)
        # A text batch is filled up with "", so captions are counted by the plan.
        assert encoder.images == plan.missing("latents")
        texts = {text for item in plan.items for _, text in item.texts}
        assert set(encoder.captions) - {""} == texts - {""}
        reads = [dict(counted.reads_of(f"file://{at}")) for at in (self.folder, self.masks)]
        return dataset, Made(plan.missing("latents"), plan.missing("text"), *reads)


@pytest.fixture
def place(tmp_path: Path, cache_url: str) -> Place:
    fill_folder(tmp_path / "images", COUNT)
    fill_folder(tmp_path / "masks", COUNT)
    for number in range(COUNT):
        (tmp_path / "images" / TEXTS[number]).write_text(f"cat {number}, b, c, d\nline two")
    return Place(tmp_path / "images", tmp_path / "masks", cache_url)


def once(*keys: str) -> dict[str, int]:
    return dict.fromkeys(keys, 1)


def test_the_first_run_reads_each_file_once_to_see_it_and_images_once_to_encode(place: Place):
    _, made = place.run({})
    reads = {**dict.fromkeys(IMAGES, 2), **once(*TEXTS)}
    assert made == Made(COUNT, COUNT + 1, reads)  # captions, and the empty one
    _, again = place.run({})
    assert again == Made(0, 0, NOTHING)


def write(name: str, data: bytes) -> Callable[[Place], None]:
    return lambda place: (place.folder / name).write_bytes(data) and None


def touch(name: str) -> Callable[[Place], None]:
    return lambda place: os.utime(place.folder / name, (1, 1))


def rename(place: Place) -> None:
    for ending in ("png", "txt"):
        (place.folder / f"image-0001.{ending}").rename(place.folder / f"zebra.{ending}")


def copy(place: Place) -> None:
    for ending in ("png", "txt"):
        data = (place.folder / f"image-0001.{ending}").read_bytes()
        (place.folder / f"zebra.{ending}").write_bytes(data)


def remove(place: Place) -> None:
    for ending in ("png", "txt"):
        (place.folder / f"image-0001.{ending}").unlink()


def new_mask(place: Place) -> None:
    (place.masks / IMAGES[0]).write_bytes(image_bytes((96, 96), 70))


MASKED = {"mask_folder": True}
CHANGED_FILES: dict[str, tuple[Callable[[Place], None], dict[str, Any], Made]] = {
    "image": (write(IMAGES[4], image_bytes((96, 96), 50)), {}, Made(1, 0, {IMAGES[4]: 2})),
    # Its bytes decide all of its variants.
    "image with variants": (
        write(IMAGES[4], image_bytes((640, 64), 50)),
        {**CROPPED, "variants": 3},
        Made(3, 0, {IMAGES[4]: 2}),
    ),
    "caption": (write(TEXTS[2], b"new, b"), {}, Made(0, 1, once(TEXTS[2]))),
    "caption with variants": (
        write(TEXTS[2], b"new, b, c, d, e, f, g"),
        {**SHUFFLED, "variants": 3},
        Made(0, 3, once(TEXTS[2])),
    ),
    "second line": (write(TEXTS[2], b"cat 2, b, c, d\nother"), {}, Made(0, 0, once(TEXTS[2]))),
    "line ends": (write(TEXTS[2], b"cat 2, b, c, d \r\n"), {}, Made(0, 0, once(TEXTS[2]))),
    "image touched": (touch(IMAGES[1]), {}, Made(0, 0, once(IMAGES[1]))),
    "caption touched": (touch(TEXTS[1]), {}, Made(0, 0, once(TEXTS[1]))),
    "renamed": (rename, {}, Made(0, 0, once("zebra.png", "zebra.txt"))),
    # Draws are named by the image's name, so the cut is another.
    "renamed with variants": (
        rename,
        {**CROPPED, "variants": 1},
        Made(1, 0, {"zebra.png": 2, "zebra.txt": 1}),
    ),
    "copied": (copy, {}, Made(0, 0, once("zebra.png", "zebra.txt"))),
    "removed": (remove, {**CROPPED, **SHUFFLED, "variants": 2}, Made(0, 0, NOTHING)),
    "mask": (new_mask, MASKED, Made(1, 0, once(IMAGES[0]), {IMAGES[0]: 2})),
    "mask of nobody": (new_mask, {}, Made(0, 0, NOTHING)),
}


@pytest.mark.parametrize("name", CHANGED_FILES)
def test_a_changed_file_makes_again_what_it_is_part_of(place: Place, name: str):
    change, words, expected = CHANGED_FILES[name]
    place.run(words)
    change(place)
    _, made = place.run(words)
    assert made == expected
    assert place.run(words)[1] == Made(0, 0, NOTHING)


ALL_AGAIN = Made(COUNT, 0, once(*IMAGES))
TEXTS_AGAIN = Made(0, COUNT, NOTHING)
NONE_AGAIN = Made(0, 0, NOTHING)
TWO = {"variants": 2}
# before -> after, and what the second run makes.
CHANGED_WORDS: dict[str, tuple[dict[str, Any], dict[str, Any], Made]] = {
    "resolution": ({}, {"resolution": 112}, ALL_AGAIN),
    "fit": ({}, {"fit": "pad"}, ALL_AGAIN),
    "background": ({}, {"background": "#000001"}, ALL_AGAIN),
    "background in capitals": ({"background": "#AABBCC"}, {"background": "#aabbcc"}, NONE_AGAIN),
    "interpolation": ({}, {"resize_interpolation": "nearest"}, ALL_AGAIN),
    "masks": ({}, MASKED, Made(COUNT, 0, once(*IMAGES), dict.fromkeys(IMAGES, 2))),
    "masks away": (MASKED, {}, ALL_AGAIN),
    "alpha": ({}, {"alpha_mask": True}, ALL_AGAIN),
    # Two of the five are square and lie in the middle either way.
    "buckets": ({}, {"enable_bucket": False}, Made(3, 0, once(*IMAGES[1:4]))),
    "bucket range": ({}, {"min_bucket_reso": 72, "max_bucket_reso": 200}, NONE_AGAIN),
    # The others are square: of 64 px from 64 px nothing can be cut elsewhere.
    "crop rule": (
        {"enable_bucket": False, "resolution": 64},
        {**CROPPED, "variants": 1},
        Made(3, 0, once(*IMAGES[1:4])),
    ),
    "one more variant": (
        {"color_aug": True, "flip_aug": True, "variants": 2},
        {"color_aug": True, "flip_aug": True, "variants": 2, "caption_dropout_rate": 0.5},
        NONE_AGAIN,
    ),
    "variants of captions": (
        {**SHUFFLED, "keep_tokens": 3, **TWO},  # one tag that may move: one order
        {**SHUFFLED, "keep_tokens": 3, "variants": 9},
        NONE_AGAIN,
    ),
    "mirrored": ({}, {"flip_aug": True, **TWO}, ALL_AGAIN),
    "variant_seed": ({}, {"variant_seed": 3}, NONE_AGAIN),
    "prefix": ({}, {"caption_prefix": "p"}, TEXTS_AGAIN),
    "suffix": ({}, {"caption_suffix": "p"}, TEXTS_AGAIN),
    "separator": ({}, {"secondary_separator": ", "}, TEXTS_AGAIN),
    "wildcards": ({}, {"enable_wildcard": True, "variants": 20}, Made(0, 1, NOTHING)),
    "default": ({}, {"default_caption": "x", "class_tokens": "y"}, NONE_AGAIN),
    "extension": (
        {},
        {"caption_extensions": (".none",), "default_caption": "x"},
        Made(0, 1, NOTHING),
    ),
    "what training alone asks": (
        {},
        {
            "repeats": 3,
            "order_seed": 1,
            "max_bad": 0.5,
            "caption_dropout_rate": 0.5,
            "caption_dropout_every_n_epochs": 2,
            "validation_split": 0.4,
            "validation_seed": 2,
            "group": 3,
            "local_cache_gib": 1.0,
        },
        NONE_AGAIN,
    ),
}


@pytest.mark.parametrize("name", CHANGED_WORDS)
def test_a_changed_word_makes_again_what_it_decides(place: Place, name: str):
    before, after, expected = CHANGED_WORDS[name]
    old, _ = place.run(before)
    _, made = place.run(after)
    assert made == expected
    # What was there is there still: going back makes nothing.
    again, made = place.run(before)
    assert made == NONE_AGAIN
    assert as_bytes(again) == as_bytes(old)


def test_more_variants_make_only_those_that_are_new(place: Place):
    words = {**CROPPED, **SHUFFLED}
    fill_folder(place.folder, COUNT, shapes=[(640, 64), (64, 640)])  # with room to cut in
    for number in range(COUNT):
        (place.folder / TEXTS[number]).write_text(f"{number}, b, c, d, e, f, g, h, i, j")
    place.run({**words, "variants": 2})
    _, made = place.run({**words, "variants": 5})
    assert made == Made(3 * COUNT, 3 * COUNT, once(*IMAGES))
    assert place.run({**words, "variants": 3})[1] == NONE_AGAIN
    _, made = place.run({**words, "variants": 2, "variant_seed": 1})
    assert made == Made(2 * COUNT, 2 * COUNT, once(*IMAGES))


def test_held_out_images_are_made_as_they_are_and_not_as_they_are_drawn(place: Place):
    words = {"flip_aug": True, "color_aug": True, "shuffle_caption": True, "variants": 2}
    place.run(words)
    dataset, made = place.run({**words, "validation_split": 0.4})
    assert dataset.held_out is not None
    held = [row.key for row in dataset.held_out.rows]
    assert made.pictures <= len(held) == 2
    assert set(made.reads) <= set(held)
    assert made.captions <= 2


LATENTS: dict[str, Any] = FACTS["latents_facts"]
TEXT: dict[str, Any] = FACTS["text_facts"]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"latents_facts": {**LATENTS, "vae": "other"}}, ALL_AGAIN),
        ({"latents_facts": {**LATENTS, "dtype": "bfloat16"}}, ALL_AGAIN),
        ({"text_facts": {**TEXT, "clip_skip": 2}}, Made(0, COUNT + 1, NOTHING)),
        ({"text_facts": {**TEXT, "max_tokens": 225}}, Made(0, COUNT + 1, NOTHING)),
        ({"text_facts": {**TEXT, "text": "other"}}, Made(0, COUNT + 1, NOTHING)),
        ({"text_facts": dict(reversed(TEXT.items()))}, NONE_AGAIN),  # the order says nothing
        (
            {
                "latents_facts": {**LATENTS, "dtype": "float16"},
                "text_facts": {**TEXT, "dtype": "float16"},
            },
            Made(COUNT, COUNT + 1, once(*IMAGES)),
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_another_encoder_makes_its_own_half_again(
    place: Place, facts: dict[str, Any], expected: Made
):
    old, _ = place.run({})
    assert place.run({}, facts)[1] == expected
    again, made = place.run({})
    assert made == NONE_AGAIN
    assert as_bytes(again) == as_bytes(old)


def test_rehash_reads_everything_once_and_makes_nothing_of_what_is_the_same(place: Place):
    place.run(MASKED)
    _, made = place.run(MASKED, rehash=True)
    assert made == Made(0, 0, once(*IMAGES, *TEXTS), once(*IMAGES))


def test_a_new_folder_of_the_same_files_is_read_and_not_encoded(place: Place, tmp_path: Path):
    old, _ = place.run({})
    place.folder.rename(tmp_path / "moved")
    moved = Place(tmp_path / "moved", place.masks, place.cache_url)
    new, made = moved.run({})
    assert made == Made(0, 0, once(*IMAGES, *TEXTS))
    assert as_bytes(new) == as_bytes(old)
    folders = {entry.key.partition("/")[0] for entry in open_storage(place.cache_url).entries()}
    assert len([name for name in folders if name.startswith("sources-")]) == 2
