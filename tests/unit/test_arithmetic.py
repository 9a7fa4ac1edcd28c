"""A job's arithmetic: steps, sd-scripts' count beside ours, tokens, bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small import small_job

from raylora.check import Checked, arithmetic, check_job


def icons(folder: Path, sizes: dict[str, tuple[int, int]], caption: str = "a cat") -> Path:
    """Small pictures of noise with captions; a name may begin with a folder."""
    for number, (name, size) in enumerate(sizes.items()):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(file)
        file.with_suffix(".txt").write_text(f"{caption}, {number}")
    return folder


def checked(tmp_path: Path, **more: Any) -> Checked:
    given = {"data__folder": str(tmp_path / "images"), "training__images_per_step": 4, **more}
    return check_job(small_job(str(tmp_path / "store"), **given))


def test_each_bucket_has_its_short_batch_in_sd_scripts_and_an_epoch_one_here(tmp_path: Path):
    wide = {f"w{n}.png": (96, 56) for n in range(5)}
    square = {f"s{n}.png": (64, 64) for n in range(6)}
    icons(tmp_path / "images", wide | square)
    numbers = arithmetic(checked(tmp_path))
    assert numbers["buckets"] == {"64x64": 6, "80x48": 5}
    assert numbers["steps_per_epoch"] == 3  # 11 images, 4 a step
    assert numbers["steps_of_one_bucket"] == 2
    there = numbers["sd_scripts"]
    assert there["steps_per_epoch"] == 2 + 2
    assert there["steps_per_epoch_on_2_gpus"] == 2
    assert there["epochs_of_these_steps_on_2_gpus"] == numbers["steps"] / 2


def test_data_sets_of_sd_scripts_do_not_share_batches(tmp_path: Path):
    icons(tmp_path / "images", {f"s{n}.png": (64, 64) for n in range(6)})
    folder = str(tmp_path / "images")
    together = [{"folder": folder}, {"folder": folder, "repeats": 2}]
    apart = [{"folder": folder}, {"folder": folder, "repeats": 2, "group": 1}]
    counts = [
        arithmetic(checked(tmp_path, data__folder=None, data__sets=sets))["sd_scripts"]
        for sets in (together, apart)
    ]
    assert [one["steps_per_epoch"] for one in counts] == [5, 5]  # 18 / 4, or 6 / 4 and 12 / 4
    uneven = [{"folder": folder}, {"folder": folder, "group": 1}]
    numbers = arithmetic(checked(tmp_path, data__folder=None, data__sets=uneven))
    assert (numbers["steps_per_epoch"], numbers["sd_scripts"]["steps_per_epoch"]) == (3, 4)
    assert [one["images"] for one in numbers["sets"]] == [6, 6]
    assert [one["showings"] for one in numbers["sets"]] == [6, 6]


def test_the_longest_caption_is_named_and_what_would_hold_it(tmp_path: Path):
    icons(tmp_path / "images", {f"{n}.png": (64, 64) for n in range(3)})
    (tmp_path / "images/1.txt").write_text("cat " * 100)
    found = checked(tmp_path, data__caption_prefix="a cat", training__images_per_step=3)
    assert found.tokens == {
        "longest": 102,
        "image": "1.png",
        "read": 75,
        "counted": 3,
        "cut_off": 1,
    }
    (advice,) = [warning for warning in found.warnings if "tokens" in warning]
    assert advice == (
        "1 of 3 captions are longer than the 75 tokens that are read; the rest of them is cut "
        "off. The longest has 102 (1.png). Set family.max_tokens: 150."
    )
    longer = checked(
        tmp_path,
        data__caption_prefix="a cat",
        family__max_tokens=150,
        training__images_per_step=3,
    )
    assert longer.tokens["cut_off"] == 0
    assert longer.warnings == []


def test_the_bytes_of_variants_are_those_that_the_cache_will_hold(tmp_path: Path):
    from raylora.local import cache_here

    icons(tmp_path / "images", {f"{n}.png": (96, 70) for n in range(5)}, "a, b, c, d")
    drawn = checked(
        tmp_path,
        data__fit="crop",
        data__random_crop=True,
        data__shuffle_caption=True,
        data__variants=3,
    )
    numbers = arithmetic(drawn)["cache"]
    assert (numbers["pictures_each"], numbers["captions_each"]) == (3, 3)
    assert 5 < numbers["pictures"] <= 15
    assert numbers["picture_bytes"] == 4 * 4 * (80 // 4) * (48 // 4)
    assert numbers["caption_bytes"] == 4 * 77 * 96
    dataset = cache_here(drawn).training
    entries = {key for row in dataset.rows for key in row.latents_keys}
    assert numbers["pictures"] == len(entries)
    held = sum(
        sum(tensor.nbytes for tensor in one.values())
        for one in dataset.fetch_pictures(sorted(entries))
    )
    texts = {key for row in dataset.rows for key in row.text_keys}
    held += sum(
        sum(tensor.nbytes for tensor in one.values()) for one in dataset.fetch_texts(sorted(texts))
    )
    assert numbers["captions"] == len(texts) + 1
    assert numbers["bytes"] == held + numbers["caption_bytes"]


@pytest.mark.parametrize(
    ("more", "pictures", "captions"),
    [({"data__cache": "none"}, 0, 0), ({"data__cache_text": False}, 1, 0)],
)
def test_what_is_encoded_as_it_is_shown_takes_no_room(
    tmp_path: Path, more: dict[str, Any], pictures: int, captions: int
):
    icons(tmp_path / "images", {f"{n}.png": (64, 64) for n in range(5)})
    numbers = arithmetic(checked(tmp_path, **more))
    assert (numbers["cache"]["pictures_each"], numbers["cache"]["captions_each"]) == (
        pictures,
        captions,
    )
    assert numbers["to_encode"] == {"images": 5 * pictures, "captions": 1}
