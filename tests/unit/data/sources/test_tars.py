"""WebDataset tars read as a folder."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from listed import found, put, set_words
from listed import listing_of as list_at

from raylora.base.errors import DataError, MissingObject, StorageError
from raylora.base.storage import Entry, Storage, open_storage
from raylora.base.storage_file import FileStorage
from raylora.data.sources import range_file
from raylora.data.sources.listing import Listing
from raylora.data.sources.source import open_source
from raylora.data.sources.tars import TarFolder, read_members, tars_folder

LONG = "folder/" * 20 + "long-ünï-name" * 5


class Watched(FileStorage):
    """A folder that notes each ranged read: (key, bytes)."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.reads: list[tuple[str, int]] = []

    def read_range(self, key: str, start: int, length: int) -> bytes:
        self.reads.append((key, length))
        return super().read_range(key, start, length)


def tar_of(
    path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def opened(data: Path, cache: Storage) -> TarFolder:
    return TarFolder(Watched(str(data)), cache)


def listing_of(data: Path, cache: Storage, **more: object) -> Listing:
    return list_at(data, cache, tars=True, **more)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_objects(data: Path, cache: Storage, form: int):
    contents = {f"{number:03d}.jpg": os.urandom(100 * number) for number in range(30)}
    if form != tarfile.USTAR_FORMAT:
        contents[f"{LONG}.png"] = b"long"
    tar_of(data / "a.tar", contents.items(), form)
    tar_of(data / "deep/b.TAR", [("x/y.png", b"y")])
    tars = opened(data, cache)
    keys = sorted([*(f"a.tar/{name}" for name in contents), "deep/b.TAR/x/y.png"])
    assert [entry.key for entry in tars.scan()] == keys
    for name, content in contents.items():
        assert tars.read(f"a.tar/{name}") == content
    for entry in tars.entries():
        assert tars.entry(entry.key) == entry
        assert entry.size_bytes == len(tars.read(entry.key))


def test_reading_a_member_is_one_ranged_read(data: Path, cache: Storage):
    tar_of(data / "a.tar", [("x.png", b"0123456789"), ("y.png", b"abc")])
    tars = opened(data, cache)
    assert tars.read("a.tar/y.png") == b"abc"
    tars._folder.reads.clear()
    assert tars.read("a.tar/x.png") == b"0123456789"
    assert tars.read_range("a.tar/x.png", 7, 3) == b"789"
    assert tars._folder.reads == [("a.tar", 10), ("a.tar", 3)]
    with pytest.raises(StorageError, match=r"a.tar/x.png: bytes 8 to 12 .* it has 10"):
        tars.read_range("a.tar/x.png", 8, 4)


def test_headers_are_read_once_for_all_processes(data: Path, cache: Storage):
    tar_of(data / "a.tar", [("x.png", b"x")])
    first = opened(data, cache)
    listed = first.entries()
    assert first._folder.reads
    assert [entry.key.rpartition("/")[0] for entry in cache.entries()] == [
        tars_folder(f"file://{data}")
    ]
    second = opened(data, cache)
    assert second.entries() == listed
    assert second._folder.reads == []
    assert pickle.loads(pickle.dumps(second)).read("a.tar/x.png") == b"x"


def test_a_tar_that_changed_is_read_anew(data: Path, cache: Storage):
    tar_of(data / "a.tar", [("x.png", b"x")])
    os.utime(data / "a.tar", ns=(1, 1))
    tars = opened(data, cache)
    (before,) = tars.entries()
    tar_of(data / "a.tar", [("y.png", b"y"), ("x.png", b"z")])
    os.utime(data / "a.tar", ns=(2, 2))
    after = tars.entries()
    assert [entry.key for entry in after] == ["a.tar/x.png", "a.tar/y.png"]
    assert before.tag != after[0].tag
    assert tars.read("a.tar/x.png") == b"z"


def test_a_spoilt_table_in_the_cache_is_made_anew(data: Path, cache: Storage):
    tar_of(data / "a.tar", [("x.png", b"x")])
    listed = opened(data, cache).entries()
    (table,) = cache.entries()
    cache.write(table.key, b"spoilt")
    assert opened(data, cache).entries() == listed
    assert cache.read(table.key) != b"spoilt"


def test_tags_tell_members_apart(data: Path, cache: Storage):
    tar_of(data / "a.tar", [("x.png", b"x"), ("y.png", b"x")])
    x, y = opened(data, cache).entries()
    tag = open_storage(str(data)).entries()[0].tag
    assert x.tag != y.tag
    assert x.tag.startswith(tag)


def test_large_bodies_are_skipped_and_small_ones_read_in_one_go(data: Path, cache: Storage):
    tar_of(data / "large.tar", [(f"{number}.png", bytes(500_000)) for number in range(20)])
    tar_of(data / "small.tar", [(f"{number}.png", bytes(2_000)) for number in range(500)])
    tars = opened(data, cache)
    assert len(tars.entries()) == 520
    large = [length for key, length in tars._folder.reads if key == "large.tar"]
    small = [length for key, length in tars._folder.reads if key == "small.tar"]
    assert len(large) <= 23
    assert sum(large) < 200_000
    assert len(small) < 12


def test_the_members_of_a_tar_are_not_held_as_python_objects(
    data: Path, cache: Storage, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(range_file, "_MOST_BYTES", 2**13)
    tar_of(data / "a.tar", [(f"{number}.png", b"") for number in range(2000)], tarfile.GNU_FORMAT)
    (tar,) = open_storage(str(data)).entries()
    tracemalloc.start()
    members = read_members(open_storage(str(data)), tar)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(members) == 2000
    assert peak_bytes < 400 * 2000


def test_the_last_of_two_members_of_one_name_counts(data: Path, cache: Storage):
    tar_of(data / "a.tar", [("x.png", b"first"), ("./x.png", b"last")])
    tars = opened(data, cache)
    assert [entry.key for entry in tars.entries()] == ["a.tar/x.png"]
    assert tars.read("a.tar/x.png") == b"last"


def test_links_folders_and_hidden_names_are_no_images(data: Path, cache: Storage):
    data.mkdir()
    with tarfile.open(data / "a.tar", "w") as archive:
        for name, kind, target in (
            ("./", tarfile.DIRTYPE, ""),
            ("./x.png", tarfile.REGTYPE, ""),
            ("./again.png", tarfile.LNKTYPE, "./x.png"),
            ("./symbolic.png", tarfile.SYMTYPE, "x.png"),
            ("./._x.png", tarfile.REGTYPE, ""),
            ("/abs.png", tarfile.REGTYPE, ""),
            ("../up.png", tarfile.REGTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 4 * (kind == tarfile.REGTYPE)
            archive.addfile(info, io.BytesIO(b"data"))
    tars = opened(data, cache)
    assert [entry.key for entry in tars.entries()] == ["a.tar/again.png", "a.tar/x.png"]
    assert tars.read("a.tar/again.png") == b"data"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_is_an_error_or_gives_whole_members(
    data: Path, cache: Storage, form: int
):
    members = {f"{LONG if number == 2 else number}.png": bytes([number]) * 700 for number in (1, 2)}
    whole = tar_of(data / "a.tar", members.items(), form).read_bytes()
    end = len(whole.rstrip(b"\0"))
    lengths = [*range(0, end + 1024, 128), *(512 * k + d for k in range(10) for d in (-1, 1))]
    errors: list[str] = []
    for length in (length for length in lengths if 0 <= length < len(whole)):
        (data / "a.tar").write_bytes(whole[:length])
        os.utime(data / "a.tar", ns=(length, length))
        tars = opened(data, cache)
        try:
            listed = tars.entries()
        except DataError as error:
            errors.append(str(error))
            continue
        for entry in listed:
            assert tars.read(entry.key) == members[entry.key.removeprefix("a.tar/")]
    assert len(errors) > 40
    for error in errors:
        assert error.startswith(f"file://{data}/a.tar: ")
        assert "Make the tar anew" in error


def test_a_header_broken_in_the_middle_is_an_error(data: Path, cache: Storage):
    path = tar_of(data / "a.tar", [(f"{number}.png", b"x") for number in range(5)])
    content = bytearray(path.read_bytes())
    content[3 * 1024 + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.tar: broken after 3 members, at byte 3072\. Make"):
        opened(data, cache).entries()
    assert cache.entries() == []


@pytest.mark.parametrize("content", [b"", b"x", b"\x1f\x8b" + bytes(2000), os.urandom(5000)])
def test_what_is_no_tar_is_an_error(data: Path, cache: Storage, content: bytes):
    put(data, "a.tar", data=content)
    with pytest.raises(DataError, match=r"a.tar: cannot be read as a tar .*Make the tar anew"):
        opened(data, cache).entries()


def test_a_tar_that_leads_back_to_itself_is_an_error(data: Path, cache: Storage):
    path = tar_of(data / "a.tar", [("x.png", b"x"), ("y.png", b"y")], tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    header = tarfile.TarInfo.frombuf(bytes(content[1024:1536]), "utf-8", "strict")
    header.size = -512  # the next header is this one
    content[1024:1536] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.tar: broken; a member's size is wrong"):
        opened(data, cache).entries()


def test_an_empty_tar_has_no_members(data: Path, cache: Storage):
    tar_of(data / "a.tar", [])
    for _ in range(2):  # from its headers, and from the cache
        assert opened(data, cache).entries() == []


def test_entries_below_a_folder_or_a_tar(data: Path, cache: Storage):
    for name in ("a.tar", "a.tar-1.tar", "a/b.tar", "a/bb.tar"):
        tar_of(data / name, [("1.png", b""), ("x/2.png", b""), ("x!/3.png", b"")])
    tars = opened(data, cache)
    keys = [entry.key for entry in tars.entries()]
    assert keys == sorted(keys)
    assert len(keys) == 12
    for prefix in ("a", "a/b.tar", "a/b.tar/x", "a.tar/x/", "none", "a/b"):
        wanted = [key for key in keys if key.startswith(f"{prefix.rstrip('/')}/")]
        assert [entry.key for entry in tars.entries(prefix)] == wanted
    inner = tars.within("a")
    assert inner.url == f"file://{data}/a"
    assert [entry.key for entry in inner.entries("b.tar/x")] == ["b.tar/x/2.png"]
    with pytest.raises(StorageError, match="cannot be opened as a folder"):
        tars.within("a.tar/x")


def test_nothing_is_written_into_tars(data: Path, cache: Storage):
    tar_of(data / "a.tar", [("x.png", b"x")])
    tars = opened(data, cache)
    for use in (
        lambda: tars.write("a.tar/y", b""),
        lambda: tars.create("y", b""),
        lambda: tars.delete("a.tar/x.png"),
    ):
        with pytest.raises(StorageError, match="tars are only read"):
            use()


@pytest.mark.parametrize("key", ["a.tar/none", "a.tar", "b.tar/x.png", "x.png", "a.tar/x.png/y"])
def test_a_missing_member_is_named(data: Path, cache: Storage, key: str):
    tar_of(data / "a.tar", [("x.png", b"x")])
    tars = opened(data, cache)
    with pytest.raises(MissingObject, match=f"{key}: there is no such member"):
        tars.read(key)
    assert tars.entry(key) is None


def test_all_images_of_tars_are_used_with_the_captions_beside_them(data: Path, cache: Storage):
    tar_of(data / "10_cat/a.tar", [("1.JPG", b"1"), ("1.txt", b"one"), ("5_x/2.png", b"2")])
    tar_of(data / "b.tar", [("3.png", b"3"), ("3.caption", b"three"), ("3.json", b"{}")])
    assert found(listing_of(data, cache, repeats=3)) == {
        "10_cat/a.tar/1.JPG": (3, None, "10_cat/a.tar/1.txt"),
        "10_cat/a.tar/5_x/2.png": (3, None, None),
        "b.tar/3.png": (3, None, "b.tar/3.caption"),
    }


def test_a_list_names_members_by_their_tar(data: Path, cache: Storage):
    tar_of(data / "a.tar", [("1.jpg", b"1"), ("2.jpg", b"2")])
    (data / "list.jsonl").write_text('{"path": "a.tar/2.jpg", "text": "two"}')
    listing = listing_of(data, cache, manifest=data / "list.jsonl")
    assert listing.images["caption"].to_pylist() == ["two"]
    assert listing.images["key"].to_pylist() == ["a.tar/2.jpg"]


def test_what_is_beside_the_tars_is_noted(data: Path, cache: Storage):
    tar_of(data / "a.tar", [("1.jpg", b"1")])
    put(data, "b.tar.gz", "c.tgz", "d.png", "e.txt")
    assert listing_of(data, cache).notes == (
        "compressed tars are not read: b.tar.gz, c.tgz. Decompress them; images hardly shrink in "
        "them.",
        "1 image beside the tars not used. Pack them, or give them a set.",
    )


def test_tars_without_images_are_an_error(data: Path, cache: Storage):
    put(data, "a.tar.gz")
    with pytest.raises(DataError, match=r"no image in a \*.tar here .*a.tar.gz. Decompress"):
        listing_of(data, cache)
    with pytest.raises(DataError, match=r"no image in a \*.tar here .*Check folder"):
        listing_of(data / "none", cache)


def test_tars_in_s3_are_read_in_ranges(s3_url: str, tmp_path: Path):
    contents = {f"{number}.png": os.urandom(3000) for number in range(5)}
    store = open_storage(s3_url)
    store.write("tars/a.tar", tar_of(tmp_path / "a.tar", contents.items()).read_bytes())
    words = set_words(f"{s3_url}/tars", tars=True)
    source = open_source(words, store.within("cache"))
    assert {entry.key: source.read(entry.key) for entry in source.scan()} == {
        f"a.tar/{name}": content for name, content in contents.items()
    }


def test_a_range_file_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(range_file, "_FIRST_BYTES", 8)
    monkeypatch.setattr(range_file, "_MOST_BYTES", 64)
    content = os.urandom(1000)
    storage = open_storage(str(tmp_path))
    storage.write("x", content)
    rng, real = np.random.default_rng(0), io.BytesIO(content)
    file = range_file.RangeFile(storage, Entry("x", 1000, ""))
    for _ in range(500):
        whence = int(rng.choice([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]))
        offset = int(rng.integers(0, 1100)) if whence == os.SEEK_SET else int(rng.integers(9)) - 9
        place = (max(offset, -real.tell()), whence)
        assert file.seek(*place) == real.seek(*place)
        count = int(rng.choice([1, 5, 50, 500]))
        assert file.read(count) == real.read(count)
        assert file.tell() == real.tell()
    watched = Watched(str(tmp_path))
    assert range_file.RangeFile(watched, Entry("x", 1000, "")).read(900) == content[:900]
    assert watched.reads == [("x", 900)]
    with pytest.raises(ValueError, match="cannot seek to -1"):
        file.seek(-1)
