"""What is found in a data folder: images, their captions and masks, and what is left out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from listed import beside, found, listing_of, put, set_words

from raylora.base.errors import DataError
from raylora.base.storage import Entry, Storage, open_storage
from raylora.data.sources.listing import list_set
from raylora.data.sources.source import SourceWords, open_source
from raylora.data.sources.tars import TarFolder

BIG = """
import json, resource, sys, time
import pyarrow as pa
from raylora.base.storage import Entry
from raylora.base.storage_file import FileStorage
from raylora.data.sources.listing import list_set
from listed import set_words

class Synthetic(FileStorage):
    count = 1
    def scan(self, prefix=""):
        for number in range(self.count):
            tag = f"{number * 7919:032x}"
            yield Entry(f"10_a concept/image-{number:09d}.jpg", 1000 + number, tag)
            yield Entry(f"10_a concept/image-{number:09d}.txt", 1000 + number, tag)

def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

source, words = Synthetic("/big"), set_words("/big")
list_set(source, words)  # imports are not what is measured
source.count = int(sys.argv[1])
before, start = peak_bytes(), time.perf_counter()
listing = list_set(source, words)
rows = listing.images["caption_file"]
print(json.dumps({
    "bytes": peak_bytes() - before,
    "seconds": time.perf_counter() - start,
    "images": len(listing.images),
    "captions": len(listing.captions),
    "last": [listing.images["key"][-1].as_py(), listing.captions["key"][rows[-1].as_py()].as_py()],
    "pandas": "pandas" in sys.modules,
}))
"""


def measured(count: int) -> dict[str, object]:
    answer = subprocess.run(
        [sys.executable, "-c", BIG, str(count)],
        check=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    return dict(json.loads(answer.stdout))


def test_a_plain_folder_gives_its_images_and_the_captions_beside_them(tmp_path: Path):
    put(tmp_path, "b.PNG", "a.Jpg", "a.txt", "b.caption", "notes.md", "below/c.png")
    assert found(listing_of(tmp_path, repeats=3)) == {
        "a.Jpg": (3, None, "a.txt"),
        "b.PNG": (3, None, "b.caption"),
    }


def test_sizes_and_tags_are_those_of_the_files(tmp_path: Path):
    put(tmp_path, "b.png", data=b"four")
    put(tmp_path, "a.png", "a.txt", "unused.txt", data=b"sixsix")
    listing = listing_of(tmp_path)
    entries = {entry.key: entry for entry in open_storage(str(tmp_path)).entries()}
    for table, keys in ((listing.images, ["a.png", "b.png"]), (listing.captions, ["a.txt"])):
        rows = table.select(["key", "size_bytes", "tag"]).to_pylist()
        assert [Entry(**row) for row in rows] == [entries[key] for key in keys]


def test_the_columns_are_of_the_promised_types(tmp_path: Path):
    schema = listing_of(put(tmp_path, "a.png")).images.schema
    assert dict(zip(schema.names, map(str, schema.types), strict=True)) == {
        "key": "string",
        "size_bytes": "int64",
        "tag": "string",
        "repeats": "int32",
        "concept": "string",
        "caption": "large_string",
        "caption_file": "int32",
        "mask_file": "int32",
    }


def test_children_named_n_concept_are_shown_n_times(tmp_path: Path):
    put(tmp_path, "10_sks dog/a.png", "1_big_cat/b.webp", "1_big_cat/b.txt", "1_big_cat/x/c.png")
    assert found(listing_of(tmp_path)) == {
        "10_sks dog/a.png": (10, "sks dog", None),
        "1_big_cat/b.webp": (1, "big_cat", "1_big_cat/b.txt"),
    }


def test_folders_that_are_left_out_are_named(tmp_path: Path):
    put(tmp_path, "5_cat/a.png", "5_cat/deep/z.png", "dogs/b.png", "0_none/c.png", "d.png")
    put(tmp_path, "7_empty/x.txt", "e.gif")
    listing = listing_of(tmp_path)
    assert list(found(listing)) == ["5_cat/a.png"]
    assert listing.notes == (
        "1 image in the data folder itself not used: it is not named N_concept, as others beside "
        "it are.",
        "1 image in 0_none not used: it is not named N_concept, as others beside it are.",
        "1 image in 5_cat/deep not used: it is below the folder (recursive: true takes them).",
        "1 image in dogs not used: it is not named N_concept, as others beside it are.",
        "no image directly in 7_empty.",
        "1 image ending in .gif not used: convert to PNG, JPEG or WebP.",
    )


def test_a_thousand_folders_that_are_left_out_are_not_a_thousand_notes(tmp_path: Path):
    put(tmp_path, "1_cat/a.png", *(f"other-{number:03d}/a.png" for number in range(100)))
    notes = listing_of(tmp_path).notes
    assert len(notes) == 21
    assert notes[-1].startswith("80 images in 80 more folders not used")


def test_recursive_takes_images_from_below(tmp_path: Path):
    put(tmp_path / "plain", "a.png", "x/b.png", "x/y/c.png")
    assert list(found(listing_of(tmp_path / "plain", recursive=True))) == [
        "a.png",
        "x/b.png",
        "x/y/c.png",
    ]
    put(tmp_path / "concept", "2_cat/x/d.png", "2_cat/x/d.txt", "other/e.png")
    assert found(listing_of(tmp_path / "concept", recursive=True)) == {
        "2_cat/x/d.png": (2, "cat", "2_cat/x/d.txt")
    }


def test_showings_beyond_all_reason_are_refused(tmp_path: Path):
    put(tmp_path, "20240131093000_trip/a.png")
    with pytest.raises(DataError, match=r"20240131093000 showings an epoch are too many.*rename"):
        listing_of(tmp_path)


def test_extensions_are_looked_for_in_order_and_a_second_caption_is_named(tmp_path: Path):
    put(tmp_path, "a.png", "a.txt", "a.caption", "b.png", "b.caption")
    listing = listing_of(tmp_path)
    assert beside(listing.captions, listing.images["caption_file"]) == ["a.txt", "b.caption"]
    assert listing.notes == (
        "1 image with two caption files; the first of .txt, .caption is used: a.png.",
    )
    other = listing_of(tmp_path, caption_extensions=[".caption", ".txt"])
    assert beside(other.captions, other.images["caption_file"]) == ["a.caption", "b.caption"]


def test_captions_are_found_in_any_case_and_as_written_first(tmp_path: Path):
    put(tmp_path, "a.png", "a.TXT", "a.txt", "b.png", "b.Txt", "c.png", "c.Tags.TXT", "c.txt")
    assert [row[2] for row in found(listing_of(tmp_path)).values()] == ["a.txt", "b.Txt", "c.txt"]
    upper = found(listing_of(tmp_path, caption_extensions=[".tags.txt", ".TXT"]))
    assert [row[2] for row in upper.values()] == ["a.TXT", "b.Txt", "c.Tags.TXT"]


def test_without_caption_extensions_there_are_no_captions(tmp_path: Path):
    put(tmp_path, "a.png", "a.txt")
    assert found(listing_of(tmp_path, caption_extensions=[])) == {"a.png": (1, None, None)}


def test_face_coordinates_are_dropped_to_find_a_caption(tmp_path: Path):
    put(tmp_path, "1_x/anna_10_20_30_40.png", "1_x/anna_1_2_3_4.png", "1_x/anna.txt")
    put(tmp_path, "1_x/bo_1_2_3_4.png", "1_x/bo_1_2_3_4.txt", "1_x/bo.txt")
    put(tmp_path, "1_x/cy_1_2_3.png", "1_x/cy.txt", "1_x/_1_2_3_4.png", "1_x/d_d_1_2_3_4.png")
    put(tmp_path, "1_x/d_d.txt", "1_a_b_c_d/e.png", "1.txt")
    listing = listing_of(tmp_path)
    assert {key: row[2] for key, row in found(listing).items()} == {
        "1_a_b_c_d/e.png": None,
        "1_x/_1_2_3_4.png": None,
        "1_x/anna_10_20_30_40.png": "1_x/anna.txt",
        "1_x/anna_1_2_3_4.png": "1_x/anna.txt",
        "1_x/bo_1_2_3_4.png": "1_x/bo_1_2_3_4.txt",
        "1_x/cy_1_2_3.png": None,
        "1_x/d_d_1_2_3_4.png": "1_x/d_d.txt",
    }
    assert listing.notes == ()
    assert listing.captions["key"].to_pylist() == [
        "1_x/anna.txt",
        "1_x/bo_1_2_3_4.txt",
        "1_x/d_d.txt",
    ]


def test_images_that_differ_only_in_their_ending_share_a_caption(tmp_path: Path):
    put(tmp_path, "a.png", "a.jpg", "a.txt", "b.png", "b.txt", "c.png", "c.jpg")
    listing = listing_of(tmp_path)
    assert [row[2] for row in found(listing).values()] == ["a.txt", "a.txt", "b.txt", None, None]
    assert listing.notes == (
        "2 images differ only in their ending and share a caption file: a.txt.",
    )


def test_a_mask_has_the_images_path_or_its_name(tmp_path: Path):
    put(tmp_path / "data", "1_x/a.png", "1_x/b.png", "1_x/c.png", "1_y/b.webp", "1_y/d.png")
    put(tmp_path / "masks", "1_x/a.jpg", "b.png", "1_y/b.PNG", "deep/d.png", "unused.png", "c.txt")
    listing = listing_of(tmp_path / "data", mask_folder=tmp_path / "masks")
    assert beside(listing.masks, listing.images["mask_file"]) == [
        "1_x/a.jpg",
        "b.png",
        None,
        "1_y/b.PNG",
        None,
    ]
    assert listing.masks["key"].to_pylist() == ["1_x/a.jpg", "1_y/b.PNG", "b.png"]


def test_masks_inside_the_data_folder_are_not_trained_on(tmp_path: Path):
    put(tmp_path, "a.png", "masks/a.png", "x/b.png")
    listing = listing_of(tmp_path, mask_folder=tmp_path / "masks", recursive=True)
    assert list(found(listing)) == ["a.png", "x/b.png"]
    assert beside(listing.masks, listing.images["mask_file"]) == ["a.png", None]


def test_a_mask_folder_without_masks_is_an_error(tmp_path: Path):
    put(tmp_path / "data", "a.png")
    with pytest.raises(DataError, match=r"no mask here \(looked for .*Check mask_folder"):
        listing_of(tmp_path / "data", mask_folder=tmp_path / "masks")


def test_an_empty_folder_is_an_error_with_the_next_thing_to_try(tmp_path: Path):
    put(tmp_path / "none", "readme.md")
    with pytest.raises(DataError, match=r"no image here \(looked for .*png.*Check folder"):
        listing_of(tmp_path / "none")
    put(tmp_path / "below", "x/a.png", "y/b.png", "y/z/c.png")
    with pytest.raises(DataError, match=r"but 3 below, in x, y, y/z\. Name .*recursive: true"):
        listing_of(tmp_path / "below")
    put(tmp_path / "deeper", "1_x/y/a.png")
    with pytest.raises(DataError, match=r"but 1 below, in 1_x/y"):
        listing_of(tmp_path / "deeper")


def test_the_source_is_the_folder_or_tars_or_the_folder_of_the_list(tmp_path: Path):
    cache = open_storage(str(tmp_path / "cache"))
    root = f"file://{tmp_path}"
    assert open_source(set_words(tmp_path / "a"), cache).url == f"{root}/a"
    both = set_words(tmp_path / "a", manifest=tmp_path / "b/list.jsonl")
    assert open_source(both, cache).url == f"{root}/a"
    assert open_source(set_words(manifest=tmp_path / "b/list.jsonl"), cache).url == f"{root}/b"
    assert open_source(set_words(manifest=f"{root}/list.jsonl"), cache).url == root
    s3 = set_words(manifest="s3://bucket/list.jsonl")
    assert open_source(s3, cache).url == "s3://bucket"
    assert isinstance(open_source(set_words(tmp_path, tars=True), cache), TarFolder)
    with pytest.raises(DataError, match="Set folder, or manifest"):
        open_source(SourceWords(), cache)


class Unsorted(Storage):
    """Lists its keys in the order they are given."""

    url = "s3://unsorted"

    def __init__(self, *keys: str) -> None:
        self._keys = keys

    def scan(self, prefix: str = "") -> Iterator[Entry]:
        return (Entry(key, len(key), "tag") for key in self._keys)

    def entries(self, prefix: str = "") -> list[Entry]:
        raise AssertionError("a million entries were asked for at one time")

    def entry(self, key: str) -> Entry | None:
        raise NotImplementedError

    read = read_range = write = create = delete = within = entry  # type: ignore[assignment]


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_a_store_that_lists_folder_by_folder_is_put_in_order(
    rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("raylora.data.sources.file_columns._CHUNK", rows)
    source = Unsorted("1_a/x.png", "1_a/x.txt", "1_a b/y.png", "1_a-c/z.png", "1_a-c/z.txt")
    assert list(found(list_set(source, set_words("s3://unsorted"))).items()) == [
        ("1_a b/y.png", (1, "a b", None)),
        ("1_a-c/z.png", (1, "a-c", "1_a-c/z.txt")),
        ("1_a/x.png", (1, "a", "1_a/x.txt")),
    ]


def test_names_of_all_scripts_are_sorted_by_code_point(tmp_path: Path):
    names = ["ünï", "貓", "\uffee", "😀", "Z", "a b", "a"]
    put(tmp_path, *(f"{name}{ending}" for name in names for ending in (".png", ".txt")))
    assert found(listing_of(tmp_path)) == {
        f"{name}.png": (1, None, f"{name}.txt") for name in sorted(names, key=lambda n: n + ".")
    }
    assert list(found(listing_of(tmp_path))) == sorted(f"{name}.png" for name in names)


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Of `a.k.png` and `a.png` the second has its caption in an earlier chunk.
    stems = ["a", "a.b", "a.k", "a_1_2_3_4", "b", "b.c", *(f"c{number:02d}" for number in range(9))]
    put(tmp_path / "data", *(f"1_x/{stem}.png" for stem in stems), "0/x.png")
    put(tmp_path / "data", *(f"1_x/{stem}.caption" for stem in stems if stem != "a_1_2_3_4"))
    put(tmp_path / "masks", *(f"{stem}.png" for stem in stems[::2]), "a.jpg", "c00.webp")
    whole = listing_of(tmp_path / "data", mask_folder=tmp_path / "masks")
    for rows in (1, 2, 3, 5):
        monkeypatch.setattr("raylora.data.sources.file_columns._CHUNK", rows)
        cut = listing_of(tmp_path / "data", mask_folder=tmp_path / "masks")
        assert cut.images["key"].num_chunks > 1
        for name in ("images", "captions", "masks"):
            assert getattr(cut, name).to_pylist() == getattr(whole, name).to_pylist()
        assert cut.notes == whole.notes
    assert {key.rpartition(".")[0]: row[2] for key, row in found(whole).items()} == {
        f"1_x/{stem}": f"1_x/{'a' if stem == 'a_1_2_3_4' else stem}.caption" for stem in stems
    }


def test_a_missing_folder_is_told_as_an_empty_one(tmp_path: Path):
    with pytest.raises(DataError, match="no image here"):
        listing_of(tmp_path / "nowhere")


@pytest.mark.slow
def test_a_million_images_and_captions_take_under_300_mb():
    answer = measured(1_000_000)
    print(f"a million images and captions listed in {answer['seconds']:.1f} s")
    assert answer["images"] == answer["captions"] == 1_000_000
    last = "10_a concept/image-000999999"
    assert answer["last"] == [f"{last}.jpg", f"{last}.txt"]
    # What is handed back holds 187 MB of it: two names and two tags of 32 letters for each image.
    assert answer["bytes"] < 280 * 2**20


def test_listing_does_not_import_pandas():
    assert measured(10)["pandas"] is False
