"""What a plan holds: rows, work items, places."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from datafolders import (
    FACTS,
    NumpyEncoder,
    build,
    fill_folder,
    image_bytes,
    plan_of,
    small_options,
    small_sets,
)

from raylora.base.errors import DataError
from raylora.base.storage import open_storage
from raylora.data.cache.recipe import text_key
from raylora.data.dataset import (
    PlanFacts,
)


def test_other_encoders_have_other_folders(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 3)
    options = small_options(folder)
    one = plan_of(options, cache_url, **FACTS)
    two = plan_of(options, cache_url, **{**FACTS, "text_facts": {"clip_skip": 2}})
    assert one.facts.latents_folder == two.facts.latents_folder
    assert one.facts.text_folder != two.facts.text_folder
    cache = open_storage(cache_url)
    recipe = json.loads(cache.read(f"{two.facts.text_folder}/recipe.json"))
    assert recipe == {"kind": "text", "format": 2, "encoder": {"clip_skip": 2}}
    recipe = json.loads(cache.read(f"{one.facts.latents_folder}/recipe.json"))
    assert recipe == {"kind": "latents", "format": 2, "encoder": NumpyEncoder.latents_facts}


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_there_are_two_items_a_worker_where_entries_allow(
    tmp_path: Path, cache_url: str, workers: int
):
    folder = fill_folder(tmp_path / "images", 30)
    done = plan_of(small_options(folder), cache_url, workers=workers, **FACTS)
    latents = [item for item in done.items if item.kind == "latents"]
    texts = [item for item in done.items if item.kind == "text"]
    assert len(latents) >= min(30, 2 * workers)
    assert len(texts) >= min(31, 2 * workers)
    assert sum(item.count for item in latents) == done.missing("latents") == 30
    assert sum(item.count for item in texts) == done.missing("text") == 31
    for item in latents:
        keys = {picture.key for picture in item.pictures}
        assert {row.bucket for row in done.rows if row.key in keys} == {item.bucket}
    if workers < 10:
        assert len({item.count for item in texts}) <= 2  # none is much shorter
    assert len(pickle.dumps((done.facts, latents[0]))) < 4000


@pytest.mark.parametrize("most", [1, 3, 7, 1000])
def test_items_hold_each_missing_entry_once_and_no_more_than_they_may(
    tmp_path: Path, cache_url: str, most: int
):
    one = fill_folder(tmp_path / "one", 9, shapes=[(160, 96), (96, 160)])
    other = fill_folder(tmp_path / "other", 7)
    words = {"flip_aug": True, "color_aug": True, "variants": 4, "shuffle_caption": True}
    data = small_sets({"folder": one}, {"folder": other}, **words, caption_prefix="a, b, c, d")
    planned = plan_of(data, cache_url, item_entries=most, workers=2, **FACTS)
    names = [key for item in planned.items for key, _ in item.texts]
    for item in planned.items:
        # An image is read once for all of its variants.
        assert item.count < most + 4 if item.kind == "latents" else item.count <= most
        names += [key for picture in item.pictures for key, _ in picture.looks]
    assert len(set(names)) == len(names)
    wanted = {key for row in planned.rows for key in (*row.latents_keys, *row.text_keys)}
    assert set(names) == wanted | {text_key("")}
    pictures = [(item.set, one.key) for item in planned.items for one in item.pictures]
    assert len(set(pictures)) == len(pictures) == 16


def test_a_caption_that_is_wanted_anyway_is_encoded_once(tmp_path: Path, cache_url: str):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(image_bytes((96, 96), 1))
    (tmp_path / "b.txt").write_text("a red cat")
    data = small_options(tmp_path, default_caption="")
    planned = plan_of(data, cache_url, extra_captions=["a red cat", "other"], **FACTS)
    texts = [text for item in planned.items for _, text in item.texts]
    assert sorted(texts) == ["", "a red cat", "other"]


def test_a_data_set_without_captions_is_an_error_that_lists_files(tmp_path: Path, cache_url: str):
    folder = open_storage(str(tmp_path / "images"))
    for name in "abc":
        folder.write(f"{name}.png", image_bytes((96, 96), 1))
    with pytest.raises(DataError, match=r"a.png: no caption.*So have 2 more: b.png, c.png\."):
        plan_of(small_options(folder), cache_url, **FACTS)
    dataset = build(small_options(folder, default_caption="x"), cache_url, NumpyEncoder())
    assert {row.caption for row in dataset.rows} == {"x"}


def test_concept_folders_give_repeats_and_captions(tmp_path: Path, cache_url: str):
    folder = open_storage(str(tmp_path / "images"))
    fill_folder(folder.within("3_red cat"), 2)
    folder.delete("3_red cat/image-0001.txt")
    dataset = build(small_options(folder), cache_url, NumpyEncoder())
    assert [(row.repeats, row.caption) for row in dataset.rows] == [
        (3, "picture 0"),
        (3, "red cat"),
    ]


def test_the_facts_of_a_plan_name_its_places(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 2)
    facts = plan_of(small_options(folder), cache_url, **FACTS).facts
    assert isinstance(facts, PlanFacts)
    assert facts.latents_folder.startswith("latents-")
    assert facts.text_folder.startswith("text-")
    assert len(facts.latents_folder) == len("latents-") + 16
