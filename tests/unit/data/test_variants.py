"""What is drawn ahead of training and for a showing: balanced, spread, and named by little."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
from datafolders import FACTS, fill_folder, plan_of, sets_of, small_options, small_sets
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.base.errors import DataError
from raylora.base.seeds import sample_number
from raylora.data.options import DataOptions, SetOptions
from raylora.data.plan import prepare
from raylora.data.rows import Rows
from raylora.data.variants import (
    PLAIN,
    VARIANTS,
    Chooser,
    Showing,
    Variants,
    draw_picture,
    draw_text,
    variants_of,
)

SHOWING = Showing(image=1, sample=2, step=3, epoch=0, repeat=0, repeats=1)
KEYS = [f"{number}.png" for number in range(400)]


def chosen_set(**words: Any) -> SetOptions:
    (options,) = sets_of(small_options("images", **words))
    return options


def chooser(options: SetOptions, *, seed: int = 0, total_steps: int = 100) -> Chooser:
    return Chooser([options], seed=seed, total_steps=total_steps)


def look_at(options: SetOptions, key: str, variant: int, *, seed: int = 0) -> Any:
    number = sample_number(key, 0)
    return draw_picture(options, (130, 100), key, number, seed=seed, variant=variant)


def text_of(options: SetOptions, key: str, variant: int, caption: str = "a, b, c, d") -> str:
    return draw_text(options, caption, sample_number(key, 0), seed=0, variant=variant)


def chi_square(counts: list[int], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in counts)


def bound_of(cells: int) -> float:
    """What chi-square of so many cells exceeds once in a million times.

    Source: Wilson and Hilferty 1931, with the normal's 4.75 for one in a million.
    """
    free = cells - 1
    return free * (1 - 2 / (9 * free) + 4.75 * math.sqrt(2 / (9 * free))) ** 3


# -- turns


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 9),
    repeats=st.integers(1, 7),
    image=st.integers(0, 2**64 - 1),
    kind=st.sampled_from(["picture", "text"]),
)
def test_in_every_block_of_as_many_showings_each_variant_comes_once(
    count: int, repeats: int, image: int, kind: str
):
    choose = chooser(chosen_set(), seed=5)
    epochs = -(-4 * count // repeats)
    shown = []
    for epoch in range(epochs):
        for repeat in range(repeats):
            # Samples and steps are whatever the order of the epoch makes of them.
            showing = Showing(image, 7 * epoch + repeat, 100 - epoch, epoch, repeat, repeats)
            shown.append(
                choose.picture(showing, count)
                if kind == "picture"
                else choose.text(showing, 0, count)
            )
    blocks = [shown[start : start + count] for start in range(0, len(shown), count)]
    assert all(sorted(block) == list(range(count)) for block in blocks if len(block) == count)
    last = blocks[-1]
    assert len(set(last)) == len(last)


def test_turns_differ_between_images_blocks_seeds_and_pictures_and_captions():
    def order(seed: int, image: int, block: int, kind: str) -> tuple[int | None, ...]:
        choose = chooser(chosen_set(), seed=seed)
        showings = [replace(SHOWING, image=image, epoch=8 * block + n) for n in range(8)]
        if kind == "picture":
            return tuple(choose.picture(one, 8) for one in showings)
        return tuple(choose.text(one, 0, 8) for one in showings)

    orders = {
        order(seed, image, block, kind)
        for seed in range(3)
        for image in range(3)
        for block in range(3)
        for kind in ("picture", "text")
    }
    assert len(orders) == 54  # of 40,320; two alike come once in thirty such tests


def test_every_order_of_turns_is_as_likely():
    choose = chooser(chosen_set())
    orders = Counter(
        tuple(choose.picture(replace(SHOWING, image=image, epoch=n), 3) for n in range(3))
        for image in range(1200)
    )
    assert len(orders) == 6
    assert chi_square(list(orders.values()), 200) < bound_of(6)


def test_repeats_count_as_showings_and_not_as_images_of_their_own():
    choose = chooser(chosen_set())
    by_repeat = [choose.picture(replace(SHOWING, repeat=n, repeats=8), 8) for n in range(8)]
    by_epoch = [choose.picture(replace(SHOWING, epoch=n), 8) for n in range(8)]
    assert by_repeat == by_epoch


# -- drawn ahead


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_an_image_is_mirrored_in_half_of_its_variants(count: int):
    options = chosen_set(flip_aug=True)
    flips = [[look_at(options, key, variant).flip for variant in range(count)] for key in KEYS]
    # An odd number has one more of either; which one is drawn for each image.
    assert {sum(one) for one in flips} == {count // 2, (count + 1) // 2}
    first = sum(one[0] for one in flips)
    assert abs(first - len(KEYS) / 2) < 4.75 * math.sqrt(len(KEYS) / 4)
    assert all(one != other for one in flips for one, other in pairwise(one))


def test_without_flip_aug_nothing_is_mirrored():
    options = chosen_set(random_crop=True, color_aug=True)
    assert not any(look_at(options, key, variant).flip for key in KEYS for variant in range(8))


def test_mirroring_does_not_move_the_crop():
    with_it, without = chosen_set(random_crop=True, flip_aug=True), chosen_set(random_crop=True)
    for key in KEYS[:50]:
        for variant in range(4):
            both = look_at(with_it, key, variant), look_at(without, key, variant)
            assert both[0].geometry == both[1].geometry


def test_random_crops_are_spread_evenly_over_the_variants():
    options = chosen_set(random_crop=True, enable_bucket=False)
    lefts = Counter(
        look_at(options, key, variant).geometry.crop[0]
        for key in KEYS
        for variant in range(VARIANTS)
    )
    room = 125 - 96  # 130x100 is brought to 125x96
    assert set(lefts) == set(range(room + 1))
    expected = len(KEYS) * VARIANTS / (room + 1)
    assert chi_square(list(lefts.values()), expected) < bound_of(room + 1)


def test_shuffles_are_spread_evenly_over_the_variants():
    options = chosen_set(shuffle_caption=True, keep_tokens=1)
    texts = Counter(text_of(options, key, variant) for key in KEYS for variant in range(VARIANTS))
    orders = {", ".join(("a", *rest)) for rest in permutations("bcd")}
    assert set(texts) == orders
    assert chi_square(list(texts.values()), len(KEYS) * VARIANTS / 6) < bound_of(6)
    # And for each variant by itself: none of them is the caption as it was written.
    for variant in range(VARIANTS):
        alone = Counter(text_of(options, key, variant) for key in KEYS)
        assert chi_square(list(alone.values()), len(KEYS) / 6) < bound_of(6)


def test_variants_of_one_image_are_drawn_apart():
    options = chosen_set(shuffle_caption=True)
    letters = ", ".join("abcdefghij")
    texts = {text_of(options, "a.png", variant, letters) for variant in range(50)}
    assert len(texts) == 50
    assert text_of(options, "b.png", 0, letters) not in texts


def test_more_variants_leave_those_before_as_they_are():
    few, many = (
        [look_at(chosen_set(random_crop=True, variants=n), "a.png", v) for v in range(n)]
        for n in (2, 5)
    )
    assert many[:2] == few


@pytest.mark.parametrize(
    ("words", "pictures", "texts"),
    [
        ({}, 1, 1),
        ({"caption_dropout_rate": 0.5, "caption_prefix": "x"}, 1, 1),
        ({"flip_aug": True}, 8, 1),
        ({"random_crop": True, "variants": 3}, 3, 1),
        ({"color_aug": True, "variants": 1}, 1, 1),
        ({"face_crop_aug_range": (1.0, 2.0)}, 8, 1),
        ({"shuffle_caption": True}, 1, 8),
        ({"caption_tag_dropout_rate": 0.1, "variants": 2}, 1, 2),
        ({"enable_wildcard": True}, 1, 8),
        ({"enable_wildcard": True, "flip_aug": True, "cache_text": False}, 8, 1),
        ({"enable_wildcard": True, "flip_aug": True, "cache": "none"}, 1, 1),
        ({"token_warmup_step": 5, "cache_text": False}, 1, 1),
    ],
)
def test_there_are_variants_where_something_is_drawn_ahead(
    words: dict[str, Any], pictures: int, texts: int
):
    data = small_options("images", variant_seed=9, **words)
    (options,) = sets_of(data)
    assert variants_of(options, data) == Variants(pictures, texts, 9)


# -- named by little

DRAWN: dict[str, Any] = {
    "random_crop": True,
    "flip_aug": True,
    "color_aug": True,
    "shuffle_caption": True,
    "variants": 3,
}


def names(rows: Rows, key: str) -> tuple[tuple[bytes, ...], ...]:
    (row,) = (row for row in rows if row.key == key and row.set == 0)
    return row.latents_keys, row.text_keys


def test_draws_depend_on_no_other_image_set_or_worker(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 5)
    other = fill_folder(tmp_path / "other", 3)
    for storage in (folder, other):
        for entry in storage.entries():
            if entry.key.endswith(".txt"):
                (tmp_path / storage.url.rsplit("/", 1)[1] / entry.key).write_text("a, b, c, d")
    alone = plan_of(small_sets({"folder": folder}, **DRAWN), cache_url, **FACTS)
    expected = {row.key: names(alone.rows, row.key) for row in alone.rows}
    ways = [
        plan_of(small_sets({"folder": folder}, {"folder": other}, **DRAWN), cache_url, **FACTS),
        plan_of(small_options(folder, **DRAWN), cache_url, workers=8, item_entries=2, **FACTS),
        plan_of(small_options(folder, order_seed=4, repeats=3, **DRAWN), cache_url, **FACTS),
    ]
    (tmp_path / "images" / "image-0001.png").unlink()
    (tmp_path / "images" / "aaaa.png").write_bytes(other.read("image-0000.png"))
    (tmp_path / "images" / "aaaa.txt").write_text("x, y")
    ways.append(plan_of(small_options(folder, **DRAWN), cache_url, **FACTS))
    for way in ways:
        here = {row.key for row in way.rows if row.set == 0}
        assert len(here & set(expected)) >= 4
        for key in here & set(expected):
            assert names(way.rows, key) == expected[key]
    moved = fill_folder(tmp_path / "moved", 5)
    moved.write("image-0000.txt", b"a, b, c, d")
    rows = plan_of(small_options(moved, **DRAWN), cache_url, **FACTS).rows
    assert names(rows, "image-0000.png") == expected["image-0000.png"]
    rows = plan_of(small_options(moved, variant_seed=1, **DRAWN), cache_url, **FACTS).rows
    assert names(rows, "image-0000.png") != expected["image-0000.png"]


def test_live_draws_depend_on_seed_step_and_sample_alone():
    options = chosen_set(shuffle_caption=True, random_crop=True, flip_aug=True, cache="none")
    letters = ", ".join("abcdefghij")

    def drawn(showing: Showing, seed: int = 0) -> tuple[Any, str]:
        choose = chooser(options, seed=seed)
        look = choose.live_picture(showing, 0, (400, 100), "a.png")
        return look, choose.live_text(showing, 0, letters)

    first = drawn(SHOWING)
    assert drawn(SHOWING) == first
    for same in ({"image": 9}, {"epoch": 4}, {"repeat": 2, "repeats": 5}):
        assert drawn(replace(SHOWING, **same)) == first
    for other in (
        drawn(replace(SHOWING, step=4)),
        drawn(replace(SHOWING, sample=3)),
        drawn(SHOWING, 1),
    ):
        assert other[0].geometry != first[0].geometry
        assert other[1] != first[1]


def test_live_pictures_are_mirrored_half_of_the_time():
    choose = chooser(chosen_set(flip_aug=True, cache="none"))
    flips = sum(
        choose.live_picture(replace(SHOWING, sample=n), 0, (96, 96), "a.png").flip
        for n in range(2000)
    )
    assert abs(flips - 1000) < 4.75 * math.sqrt(2000 / 4)


# -- held out


@pytest.mark.parametrize("cache", [None, "none"])
def test_held_out_images_draw_nothing(tmp_path: Path, cache_url: str, cache: str | None):
    folder = fill_folder(tmp_path / "images", 8, shapes=[(130, 100)])
    for number in range(8):
        text = f"{{x|y|z}} {number}, b, c, d\nline two"
        (tmp_path / "images" / f"image-{number:04d}.txt").write_text(text)
    words = {**DRAWN, "enable_wildcard": True, "caption_tag_dropout_rate": 0.9, "cache": cache}
    if cache:
        del words["variants"]
    held: dict[int, list[Any]] = {}
    for seed in range(3):
        data = small_options(folder, validation_split=0.5, variant_seed=seed, **words)
        rows = plan_of(data, cache_url, **FACTS).held_out
        assert {(len(row.latents_keys), len(row.text_keys)) for row in rows} == {(1, 1)}
        held[seed] = list(rows)
    assert held[0] == held[1] == held[2]
    plain = plan_of(small_options(folder, enable_wildcard=False), cache_url, **FACTS).rows
    by_key = {row.key: row for row in plain}
    (options,) = sets_of(small_options(folder, **words))
    for row in held[0]:
        assert row.latents_keys == by_key[row.key].latents_keys
        assert row.crop == by_key[row.key].crop
        number = int(row.key[6:10])
        text = draw_text(options, row.caption, row.number, seed=0, variant=PLAIN)
        assert text == f"x {number}, b, c, d"
    # The same images as a held-out folder have the same names in the cache.
    own = options.held_out(folder.url)
    alone = {row.key: row for row in prepare(DataOptions(), (own,), cache_url, **FACTS).rows}
    for row in held[0]:
        assert alone[row.key].latents_keys == row.latents_keys
        assert alone[row.key].text_keys == row.text_keys


# -- captions left out whole


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("live", [False, True])
def test_captions_are_left_out_at_their_rate(rate: float, live: bool):
    choose = chooser(chosen_set(caption_dropout_rate=rate, caption_prefix="p"))
    showings = [replace(SHOWING, sample=n, step=n // 8) for n in range(4000)]
    if live:
        dropped = [choose.live_text(one, 0, "a") == "" for one in showings]
    else:
        dropped = [choose.text(one, 0, 4) is None for one in showings]
    assert dropped == [choose.is_dropped(one, 0) for one in showings]
    spread = math.sqrt(4000 * rate * (1 - rate))
    assert abs(sum(dropped) - 4000 * rate) < 4.75 * spread
    # By step and by sample: each half of the showings has its share.
    assert abs(sum(dropped[::2]) - 2000 * rate) < 4.75 * math.sqrt(2000 * rate * (1 - rate))
    assert chooser(chosen_set()).text(SHOWING, 0, 1) == 0


def test_every_nth_epoch_counts_from_one():
    choose = chooser(chosen_set(caption_dropout_every_n_epochs=3))
    dropped = [choose.text(replace(SHOWING, epoch=n), 0, 2) is None for n in range(9)]
    assert dropped == [False, False, True] * 3
    always = chooser(chosen_set(caption_dropout_every_n_epochs=1, caption_dropout_rate=0.1))
    assert all(always.is_dropped(replace(SHOWING, epoch=n), 0) for n in range(5))


def test_each_set_has_its_own_words():
    sets = sets_of(
        small_sets({"folder": "a", "caption_dropout_rate": 1.0}, {"folder": "b", "flip_aug": True})
    )
    choose = Chooser(sets, seed=0, total_steps=1)
    assert [choose.is_dropped(SHOWING, number) for number in range(2)] == [True, False]
    flips = {
        number: {
            choose.live_picture(replace(SHOWING, sample=n), number, (96, 96), "a.png").flip
            for n in range(40)
        }
        for number in range(2)
    }
    assert flips == {0: {False}, 1: {False, True}}


def test_live_tags_warm_up_with_the_step():
    choose = chooser(
        chosen_set(token_warmup_step=0.5, token_warmup_min=1, cache_text=False), total_steps=8
    )
    shown = [choose.live_text(replace(SHOWING, step=n), 0, "a, b, c, d, e") for n in range(5)]
    assert [text.count(",") + 1 for text in shown] == [1, 2, 3, 4, 5]


def test_an_image_that_no_bucket_can_hold_is_told_without_its_name():
    options = chosen_set(bucket_no_upscale=True, flip_aug=True)
    with pytest.raises(DataError, match=r"^9x9 px is smaller than one step of 16 px"):
        draw_picture(options, (9, 9), "a.png", 1, seed=0, variant=0)


def test_plain_draws_nothing():
    options = chosen_set(**DRAWN)
    plain = {look_at(options, key, PLAIN, seed=seed) for key in KEYS[:9] for seed in range(3)}
    assert len(plain) == 1
    assert not plain.pop().flip
    assert text_of(options, "a.png", PLAIN) == "a, b, c, d"
