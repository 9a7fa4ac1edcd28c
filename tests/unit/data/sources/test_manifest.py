"""Lists of images with captions: JSON lines, Parquet, and sd-scripts' metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from listed import beside, found, listing_of, put, set_words

from raylora.base.errors import DataError
from raylora.base.storage import open_storage
from raylora.data.sources import manifest
from raylora.data.sources.listing import list_set
from raylora.data.sources.manifest import read_manifest

ROWS = [
    {"image_path": "b.png", "caption": "a bee"},
    {"image_path": "deep/a.jpg", "caption": "an ant", "tags": "small, black", "repeats": 3},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as the file's ending says."""
    if path.suffix == ".parquet":
        words = dict.fromkeys(word for row in rows for word in row)
        pq.write_table(pa.table({word: [row.get(word) for row in rows] for word in words}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        metadata = {row["image_path"]: {**row, "image_size": [8, 8]} for row in rows}
        path.write_text(json.dumps(metadata, indent=2))
    return path


def texts(listing: Any) -> dict[str, str | None]:
    images = listing.images
    return dict(zip(images["key"].to_pylist(), images["caption"].to_pylist(), strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put(tmp_path, "b.png", "deep/a.jpg", "c.png", "2_x/d.png")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_a_list_names_the_images_and_their_captions(folder: Path, ending: str):
    listing = listing_of(None, manifest=write(folder / f"list{ending}", ROWS), repeats=2)
    assert found(listing) == {"b.png": (2, None, None), "deep/a.jpg": (3, None, None)}
    assert texts(listing) == {"b.png": "a bee", "deep/a.jpg": "an ant,small, black"}
    assert listing.notes == ()


@pytest.mark.parametrize("image", ["image_path", "image", "file_name", "path", "key"])
@pytest.mark.parametrize("text", ["caption", "text"])
def test_the_usual_words_are_known(folder: Path, image: str, text: str):
    for ending in (".jsonl", ".parquet"):
        rows = [{image: "b.png", text: "a bee", "width": 8}]
        listing = listing_of(None, manifest=write(folder / f"list{ending}", rows))
        assert texts(listing) == {"b.png": "a bee"}


@pytest.mark.parametrize(
    ("row", "caption"),
    [
        ({"caption": "a", "tags": "x, y"}, "a;x, y"),
        ({"caption": "a", "tags": ["x", "y"]}, "a;x; y"),
        ({"tags": ["x", "y"]}, "x; y"),
        ({"caption": "", "tags": "x"}, "x"),
        ({"caption": "a", "tags": ""}, "a"),
        ({"caption": "a", "tags": []}, "a"),
        ({"caption": "one\n\ntwo", "tags": "x\ny"}, "one\n\ntwo;x\ny"),
        ({"caption": ""}, ""),
        ({}, None),
    ],
)
def test_tags_go_behind_the_caption(folder: Path, row: dict[str, Any], caption: str | None):
    path = write(folder / "list.jsonl", [{"path": "b.png", **row}])
    assert texts(listing_of(None, manifest=path, caption_separator=";")) == {"b.png": caption}


def test_with_wildcards_tags_go_behind_every_line(folder: Path):
    row = {"path": "b.png", "caption": "one\n\ntwo", "tags": "x\ny"}
    path = write(folder / "list.jsonl", [row])
    listing = listing_of(None, manifest=path, enable_wildcard=True)
    assert texts(listing) == {"b.png": "one,x,y\ntwo,x,y"}


def test_an_image_without_a_caption_in_the_list_has_the_file_beside_it(folder: Path):
    put(folder, "b.txt", "c.txt")
    path = write(folder / "list.jsonl", [{"path": "b.png"}, {"path": "c.png", "text": "a sea"}])
    listing = listing_of(None, manifest=path)
    assert beside(listing.captions, listing.images["caption_file"]) == ["b.txt", None]
    assert texts(listing) == {"b.png": None, "c.png": "a sea"}


def test_a_name_without_ending_is_any_image_of_that_stem(tmp_path: Path):
    put(tmp_path, "a.webp", "b.v2.png", "c.jpg", "c.png", "d.jpg", "d.png", "e.png", "e.png.jpg")
    names = ["a", "b.v2", "c", "d", "d.png", "e", "e.png"]
    path = write(tmp_path / "list.json", [{"image_path": name, "tags": name} for name in names])
    listing = listing_of(None, manifest=path)
    assert texts(listing) == {
        "a.webp": "a",
        "b.v2.png": "b.v2",
        "c.jpg": "c",
        "d.jpg": "d",
        "d.png": "d.png",
        "e.png": "e.png",
    }
    assert listing.notes == (
        "1 image not used: the list names another one that differs only in its ending.",
    )


def test_names_are_taken_relative_to_the_folder_however_they_are_written(folder: Path):
    names = [f"{folder}/b.png", f"file://{folder}/x/..//c.png", "./deep/./a.jpg", "2_x\\d.png"]
    path = write(folder / "list.jsonl", [{"path": name, "text": name} for name in names])
    assert sorted(texts(listing_of(folder, manifest=path))) == [
        *("2_x/d.png", "b.png", "c.png", "deep/a.jpg"),
    ]
    words = set_words("s3://bucket/data", manifest=path)
    path.write_text('{"path": "s3://bucket/data/b.png"}')
    assert read_manifest("s3://bucket/data", words)["name"].to_pylist() == ["b.png"]


@pytest.mark.parametrize("name", ["{0}x/b.png", "../b.png", "s3://bucket/b.png", "/b.png"])
def test_a_name_outside_the_folder_says_which_folder_to_give(folder: Path, name: str):
    path = write(folder / "list.jsonl", [ROWS[0], {"path": name.format(folder)}])
    with pytest.raises(DataError, match=r"list.jsonl, line 2: .* is not in file:.*Set folder to"):
        listing_of(folder, manifest=path)


def test_images_that_are_not_there_are_counted_and_named(folder: Path):
    rows = [{"path": name} for name in ("b.png", "no1.png", "no2", "c.gif", "no3.png")]
    listing = listing_of(None, manifest=write(folder / "list.jsonl", rows))
    assert list(texts(listing)) == ["b.png"]
    (note,) = listing.notes
    assert note.startswith("4 images of ")
    assert note.endswith("no1.png, no2, c.gif, ….")


def test_a_list_of_which_nothing_is_there_is_an_error(folder: Path):
    path = write(folder / "list.jsonl", [{"path": "no1.png"}, {"path": "no2.png"}])
    with pytest.raises(DataError, match=r"has none of the 2 images .*no1.png, no2.png.*Set folder"):
        listing_of(None, manifest=path)
    path.write_text("\n")
    with pytest.raises(DataError, match="names no image"):
        listing_of(None, manifest=path)


def test_the_last_row_of_an_image_counts(folder: Path):
    rows = [{"path": f"{name}.png", "text": text} for name, text in ("b1", "c2", "b3", "b4")]
    listing = listing_of(None, manifest=write(folder / "list.jsonl", rows))
    assert texts(listing) == {"b.png": "4", "c.png": "2"}
    assert listing.notes == ("2 images listed again; the last row of each counts.",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'path': 'b.png'}", r"no JSON \(.*\): \{'path': 'b.png'\}"),
        ("[1]", r"\[1\] is no JSON object"),
        ('{"caption": "x"}', "names no image. Write one of image_path, image"),
        ('{"path": ""}', "path is '', not the path of an image"),
        ('{"path": 7}', "path is 7, not the path"),
        ('{"image": {"bytes": "x", "path": "b.png"}}', "image holds the picture itself"),
        ('{"path": "b.png", "caption": 3}', "the caption is 3, not text"),
        ('{"path": "b.png", "tags": [1]}', r"tags is \[1\], not text or a list"),
        ('{"path": "b.png", "repeats": 0}', "repeats is 0, not a whole number from 1"),
        ('{"path": "b.png", "repeats": 1.5}', "repeats is 1.5"),
        ('{"path": "b.png", "repeats": true}', "repeats is True"),
        ('{"path": "b.png", "caption": "\\ud800"}', "not clean Unicode"),
        ('{"path": "\\ud800.png"}', "not clean Unicode"),
    ],
)
def test_a_broken_line_is_named_with_its_number(folder: Path, line: str, message: str):
    path = folder / "list.jsonl"
    path.write_text(f'{{"path": "b.png"}}\n\n{line}\n')
    with pytest.raises(DataError, match=rf"list.jsonl, line 3: .*{message}"):
        listing_of(None, manifest=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{\n "b.png": {"caption": "x"},\n "c.png": "y"}',
            "line 3: c.png has 'y', where an object",
        ),
        ('{\n "b.png": {"caption": "x"}\n "c.png": {}}', "line 3: .* where ',' or '}' belongs"),
        ('{\n "b.png": {"caption" "x"}}', "line 2: .*A .json manifest is sd-scripts' metadata"),
        ('[{"path": "b.png"}]', "line 1: .* where '{' belongs.*one object a line is .jsonl"),
        ('{"b.png": {}', "line 1: the end where"),
        ('{"b.png": {},}', "line 1: '}' where '\"' belongs"),
        ("", "line 1: the end where '{' belongs"),
    ],
)
def test_broken_metadata_is_named_with_its_line(folder: Path, text: str, message: str):
    path = folder / "list.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        listing_of(None, manifest=path)


def test_metadata_may_have_a_byte_order_mark_and_be_empty(folder: Path):
    path = folder / "list.json"
    path.write_bytes(b'\xef\xbb\xbf{"b.png" : {"tags":"x"} } \n')
    assert texts(listing_of(None, manifest=path)) == {"b.png": "x"}
    path.write_text(" { } ")
    with pytest.raises(DataError, match="names no image"):
        listing_of(None, manifest=path)
    path.write_bytes(b'{"b\xff.png": {}}')
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 3\)"):
        listing_of(None, manifest=path)


def test_pictures_inside_parquet_are_refused_with_a_way_out(folder: Path):
    rows = [{"image": {"bytes": b"x", "path": "b.png"}, "text": "a bee"}]
    path = write(folder / "list.parquet", rows)
    with pytest.raises(DataError, match=r"column image holds the picture itself.*tars: true"):
        listing_of(None, manifest=path)
    path = write(folder / "list.parquet", [{"file_name": "b.png", **rows[0]}])
    assert texts(listing_of(None, manifest=path)) == {"b.png": "a bee"}


def test_parquet_is_read_in_batches_and_its_rows_are_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    put(folder, *(f"more/{number:03d}.png" for number in range(20)))
    rows = [{"path": f"more/{number:03d}.png", "text": str(number)} for number in range(20)]
    monkeypatch.setattr(manifest, "_PARQUET_ROWS", 7)
    monkeypatch.setattr(manifest, "_ROWS", 3)
    path = write(folder / "list.parquet", rows)
    listing = listing_of(None, manifest=path)
    assert list(texts(listing).values()) == [str(number) for number in range(20)]
    assert listing.notes == ()
    assert read_manifest(f"file://{folder}", set_words(manifest=path))["name"].num_chunks == 7
    rows[16]["path"] = None
    write(path, rows)
    with pytest.raises(DataError, match=r"list.parquet, row 17: it names no image"):
        listing_of(None, manifest=path)


def test_parquet_as_pandas_writes_missing_numbers(folder: Path):
    rows = [{"path": "b.png", "repeats": 2.0}, {"path": "c.png", "repeats": float("nan")}]
    listing = listing_of(None, manifest=write(folder / "list.parquet", rows), repeats=5)
    assert listing.images["repeats"].to_pylist() == [2, 5]


def test_what_is_no_list_is_refused(folder: Path):
    put(folder, "list.parquet", "list.csv")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        listing_of(None, manifest=folder / "list.parquet")
    write(folder / "list.parquet", [{"url": "b.png"}])
    with pytest.raises(DataError, match=r"no column names the images \(it has url\)"):
        listing_of(None, manifest=folder / "list.parquet")
    with pytest.raises(DataError, match=r"a manifest ends in .jsonl, .json, .parquet"):
        listing_of(None, manifest=folder / "list.csv")
    with pytest.raises(DataError, match="there is no such file"):
        listing_of(folder, manifest=folder / "none.jsonl")


def test_a_list_in_s3_is_read_from_there(s3_url: str):
    store = open_storage(s3_url)
    for key in ("data/a.png", "data/b.png"):
        store.write(key, b"x")
    rows = "".join(f'{{"file_name": "{name}.png", "text": "{name}"}}\n' for name in "ba")
    store.write("lists/list.jsonl", rows.encode())
    words = set_words(f"{s3_url}/data", manifest=f"{s3_url}/lists/list.jsonl")
    assert texts(list_set(store.within("data"), words)) == {"a.png": "a", "b.png": "b"}
