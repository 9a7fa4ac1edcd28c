"""What is found in a data folder, and which options are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from datafolders import small_options
from pydantic import ValidationError

from raylora.base.errors import DataError
from raylora.base.options import explain
from raylora.base.storage import Storage, open_storage
from raylora.data.source import DataOptions, list_samples, read_listing


def folder_of(tmp_path: Path, *keys: str) -> Storage:
    storage = open_storage(str(tmp_path / "data"))
    for key in keys:
        storage.write(key, b"x")
    return storage


def listed(storage: Storage, **options: object) -> dict[str, tuple[int, str | None, str | None]]:
    samples = list_samples(storage, small_options(storage, **options))
    return {
        sample.key: (
            sample.repeats,
            sample.concept,
            sample.caption.key if sample.caption else None,
        )
        for sample in samples
    }


def test_a_plain_folder_gives_its_images_and_the_captions_beside_them(tmp_path: Path):
    storage = folder_of(tmp_path, "b.PNG", "a.Jpg", "a.txt", "b.caption", "notes.md", "below/c.png")
    assert listed(storage, repeats=3) == {
        "a.Jpg": (3, None, "a.txt"),
        "b.PNG": (3, None, "b.caption"),
    }


def test_children_named_n_concept_are_shown_n_times(tmp_path: Path):
    storage = folder_of(
        tmp_path, "10_sks dog/a.png", "1_big_cat/b.webp", "1_big_cat/b.txt", "1_big_cat/x/c.png"
    )
    assert listed(storage) == {
        "10_sks dog/a.png": (10, "sks dog", None),
        "1_big_cat/b.webp": (1, "big_cat", "1_big_cat/b.txt"),
    }


def test_folders_that_are_left_out_are_named(tmp_path: Path):
    storage = folder_of(
        tmp_path,
        *(
            "5_cat/a.png",
            "5_cat/deep/z.png",
            "dogs/b.png",
            "0_none/c.png",
            "d.png",
            "7_empty/x.txt",
        ),
        "e.gif",
    )
    listing = read_listing(storage, small_options(storage))
    assert [sample.key for sample in listing.samples] == ["5_cat/a.png"]
    notes = "\n".join(listing.notes)
    assert "1 image in dogs not used: it is not named N_concept" in notes
    assert "1 image in 0_none not used: it is not named N_concept" in notes
    assert "1 image in the data folder itself not used" in notes
    assert "1 image in 5_cat/deep not used: it is below the folder" in notes
    assert "no image directly in 7_empty" in notes
    assert "1 image ending in .gif not used" in notes


def test_recursive_takes_images_from_below(tmp_path: Path):
    storage = folder_of(tmp_path, "a.png", "x/b.png", "x/y/c.png")
    assert list(listed(storage, recursive=True)) == ["a.png", "x/b.png", "x/y/c.png"]
    storage = folder_of(tmp_path, "2_cat/x/d.png")
    assert listed(storage, recursive=True) == {"2_cat/x/d.png": (2, "cat", None)}


def test_extensions_are_looked_for_in_order_and_a_second_caption_is_named(tmp_path: Path):
    storage = folder_of(tmp_path, "a.png", "a.txt", "a.caption")
    assert listed(storage)["a.png"][2] == "a.txt"
    assert listed(storage, caption_extensions=(".caption", ".txt"))["a.png"][2] == "a.caption"
    notes = read_listing(storage, small_options(storage)).notes
    assert notes == ["1 image with two caption files; the first of .txt, .caption is used: a.png."]


def test_face_coordinates_are_dropped_to_find_a_caption(tmp_path: Path):
    storage = folder_of(tmp_path, "anna_10_20_30_40.png", "anna.txt")
    assert listed(storage)["anna_10_20_30_40.png"][2] == "anna.txt"


def test_an_empty_folder_is_an_error_with_the_next_thing_to_try(tmp_path: Path):
    with pytest.raises(DataError, match=r"no image here .*Check data.folder"):
        listed(folder_of(tmp_path, "readme.md"))
    with pytest.raises(DataError, match=r"but 1 below, in x.*data.recursive: true"):
        listed(folder_of(tmp_path, "x/a.png"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 2048}, "max_bucket_reso 1024 is smaller than a side of resolution"),
        ({"resolution": 128}, "min_bucket_reso 256 is larger than a side of resolution 128x128"),
        ({"resolution": 500, "enable_bucket": False}, "500x500 is not a multiple of 8 px"),
        ({"resolution": 4}, "resolution 4 is below 8 px"),
        ({"background": "white"}, "background is 'white'"),
        ({"caption_extensions": ["txt"]}, "'txt' does not begin with a dot. Write '.txt'"),
        ({"bucket_reso_steps": 12}, "bucket_reso_steps is 12"),
        ({"max_bad": 2}, "max_bad is 2"),
        ({"repeats": 0}, "repeats is 0"),
        ({"fit": "stretch"}, "fit is 'stretch'"),
        ({"cash": "x"}, "cash: no such option. Did you mean 'cache'"),
    ],
)
def test_an_option_that_cannot_work_is_refused_in_a_sentence(
    settings: dict[str, object], message: str
):
    with pytest.raises(ValidationError) as caught:
        DataOptions.model_validate({"folder": "x", **settings})
    assert message in "\n".join(explain(caught.value, DataOptions))
