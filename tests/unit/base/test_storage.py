"""Claims that hold for every kind of storage."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from raylora.base.errors import MissingObject, StorageError
from raylora.base.storage import Storage, open_storage

RACERS = 8
KEYS = [f"race/{number}" for number in range(20)]

RACE = """
import os, sys, time
from raylora.base.storage import open_storage
url, name, ready, go, *keys = sys.argv[1:]
storage = open_storage(url)
storage.entry("warm")  # so that no one is still importing when the race begins
open(ready, "w").close()
while not os.path.exists(go):
    time.sleep(0.001)
for key in keys:
    if storage.create(key, name.encode()):
        print(key)
"""


def test_what_is_written_reads_back(storage: Storage):
    data = os.urandom(100_000)
    storage.write("folder/deep/object", data)
    assert storage.read("folder/deep/object") == data


def test_an_empty_object_is_an_object(storage: Storage):
    storage.write("empty", b"")
    assert storage.read("empty") == b""
    assert [(entry.key, entry.size_bytes) for entry in storage.entries()] == [("empty", 0)]


def test_a_range_is_exactly_those_bytes(storage: Storage):
    storage.write("object", bytes(range(100)))
    assert storage.read_range("object", 0, 3) == b"\x00\x01\x02"
    assert storage.read_range("object", 90, 10) == bytes(range(90, 100))
    assert storage.read_range("object", 50, 0) == b""


@pytest.mark.parametrize("start", [95, 100, 200])
def test_a_range_past_the_end_is_an_error_that_tells_the_size(storage: Storage, start: int):
    storage.write("object", bytes(100))
    with pytest.raises(StorageError, match=f"bytes {start} to {start + 10} .* it has 100"):
        storage.read_range("object", start, 10)


def test_a_missing_object_is_named(storage: Storage):
    with pytest.raises(MissingObject, match=f"{storage.url}/not/there: there is no such"):
        storage.read("not/there")
    with pytest.raises(MissingObject, match="not/there"):
        storage.read_range("not/there", 0, 1)
    assert storage.entry("not/there") is None
    storage.delete("not/there")


def test_write_replaces_and_the_tag_tells(storage: Storage):
    storage.write("object", b"first")
    before = storage.entry("object")
    time.sleep(0.02)  # a disk's clock may tick every 10 ms
    storage.write("object", b"second")
    after = storage.entry("object")
    assert storage.read("object") == b"second"
    assert before is not None
    assert after is not None
    assert (before.size_bytes, after.size_bytes) == (5, 6)
    assert before.tag != after.tag
    assert storage.entries() == [after]


def test_create_is_refused_the_second_time_and_changes_nothing(storage: Storage):
    assert storage.create("a/b", b"first")
    assert not storage.create("a/b", b"second")
    assert storage.read("a/b") == b"first"
    storage.delete("a/b")
    assert storage.entry("a/b") is None
    assert storage.create("a/b", b"third")


def test_entries_lists_a_folder_and_not_its_namesakes(storage: Storage):
    keys = ["runs/1/b", "runs/1/a/c", "runs/10/a", "runs/1.txt", "runs-1", "ünï/貓 \u202f+&=%?.png"]
    for key in keys:
        storage.write(key, key.encode())
    assert [entry.key for entry in storage.entries()] == sorted(keys)
    assert [entry.key for entry in storage.entries("runs/1")] == ["runs/1/a/c", "runs/1/b"]
    assert [entry.key for entry in storage.entries("runs/1/")] == ["runs/1/a/c", "runs/1/b"]
    assert storage.entries("runs/1.txt") == []
    assert storage.entries("nothing") == []
    assert storage.read("ünï/貓 \u202f+&=%?.png") == keys[-1].encode()


def test_a_scan_gives_what_entries_give(storage: Storage):
    for key in ["cat/a.png", "cat (2)/b.png", "cat.txt", "cat-x/y/c.png", "é", "z/1", "z/0/1"]:
        storage.write(key, key.encode())
    for prefix in ("", "z", "z/0/", "cat", "nothing"):
        scanned = list(storage.scan(prefix))
        assert sorted(scanned, key=lambda entry: entry.key) == storage.entries(prefix)


def test_a_storage_that_only_has_entries_can_be_scanned(storage: Storage):
    storage.write("a", b"")
    assert list(Storage.scan(storage)) == storage.entries()


def test_within_is_the_same_place_deeper(storage: Storage):
    inner = storage.within("runs").within("one/")
    inner.write("object", b"data")
    assert inner.url == f"{storage.url}/runs/one"
    assert storage.read("runs/one/object") == b"data"
    assert [entry.key for entry in inner.entries()] == ["object"]


@pytest.mark.parametrize(
    "key",
    ["", "/abs", "a//b", "a/", "../up", "a/../b", "./a", ".tmp-x", "a/.hidden", "a\nb", "\udc80"],
)
def test_a_key_that_could_escape_or_hide_is_refused(storage: Storage, key: str):
    for use in (
        storage.read,
        storage.entry,
        storage.delete,
        lambda key: storage.write(key, b""),
        lambda key: storage.create(key, b""),
        lambda key: storage.read_range(key, 0, 1),
    ):
        with pytest.raises(StorageError, match="cannot be the name of an object"):
            use(key)
    with pytest.raises(StorageError, match="cannot be the name of an object"):
        storage.within(key if key != "a/" else "a//")
    assert storage.entries() == []


def test_check_passes_and_leaves_nothing(storage: Storage):
    storage.write("object", b"data")
    storage.check()
    assert [entry.key for entry in storage.entries()] == ["object"]


def test_check_refuses_a_store_whose_create_overwrites(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
):
    def overwrite(key: str, data: bytes) -> bool:
        storage.write(key, data)
        return True

    monkeypatch.setattr(storage, "create", overwrite)
    with pytest.raises(StorageError, match=r"exclusive create .* overwrote an object"):
        storage.check()
    assert storage.entries() == []


def test_a_storage_is_pickled_as_its_url(storage: Storage):
    storage.write("object", b"data")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.url == storage.url
    assert copy.read("object") == b"data"
    assert open_storage(storage.url).read("object") == b"data"


@pytest.mark.slow
def test_of_eight_threads_one_creates(storage: Storage):
    # weed lets who finds a name locked wait for a second.
    keys = KEYS[:3] if storage.url.startswith("s3") else KEYS
    together = Barrier(RACERS)

    def race(name: int) -> list[str]:
        won = []
        for key in keys:
            together.wait()
            if storage.create(key, b"%d" % name):
                won.append(key)
        return won

    with ThreadPoolExecutor(RACERS) as pool:
        winners = list(pool.map(race, range(RACERS)))
    assert Counter(key for won in winners for key in won) == Counter(keys)
    for name, won in enumerate(winners):
        assert all(storage.read(key) == b"%d" % name for key in won)


@pytest.mark.slow
def test_of_four_processes_one_creates(storage: Storage, tmp_path: Path):
    go = tmp_path / "go"
    ready = [tmp_path / f"ready{name}" for name in range(4)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, storage.url, str(name), str(ready[name]), str(go), *KEYS],
            stdout=subprocess.PIPE,
        )
        for name in range(4)
    ]
    wait_for(lambda: all(file.exists() for file in ready))
    go.touch()
    winners = [process.communicate(timeout=60)[0].decode().split() for process in processes]
    assert Counter(key for won in winners for key in won) == Counter(KEYS)
    for name, won in enumerate(winners):
        assert all(storage.read(key) == b"%d" % name for key in won)


def test_a_place_of_another_kind_is_refused():
    for url in ("gs://bucket/x", "http://host/x", "file://host/x", ""):
        with pytest.raises(StorageError, match=r"no place raylora can open.*s3://bucket/prefix"):
            open_storage(url)


def test_a_url_with_credentials_is_refused_without_repeating_them():
    for url in ("s3://KEY:hush@bucket/x", "https://KEY:hush@host/x"):
        with pytest.raises(StorageError) as caught:
            open_storage(url)
        assert "hush" not in str(caught.value)


def test_a_disk_needs_no_boto(tmp_path: Path):
    code = (
        "import sys; from raylora.base.storage import open_storage;"
        "open_storage('.').check(); assert 'botocore' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def wait_for(ready: Callable[[], bool], timeout_seconds: float = 60.0) -> None:
    """Poll until `ready()`."""
    end = time.monotonic() + timeout_seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
