"""What only a disk can get wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raylora.base import storage_file
from raylora.base.errors import StorageError
from raylora.base.storage import open_storage

OBJECT_BYTES = 8 * 2**20
WRITE_FOREVER = """
import itertools, sys
from raylora.base.storage import open_storage
storage = open_storage(sys.argv[1])
for letter in itertools.cycle(b"abc"):
    storage.write("object", bytes([letter]) * int(sys.argv[2]))
"""


def test_a_killed_writer_leaves_no_half_object(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    leftovers = 0
    for _ in range(6):
        command = [sys.executable, "-c", WRITE_FOREVER, storage.url, str(OBJECT_BYTES)]
        writer = subprocess.Popen(command)
        before = set(tmp_path.glob(".tmp-*"))
        while not any(_size(file) for file in set(tmp_path.glob(".tmp-*")) - before):
            assert writer.poll() is None
            time.sleep(0.0005)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        leftovers = len(list(tmp_path.glob(".tmp-*")))
        assert {entry.key for entry in storage.entries()} <= {"object"}
        if storage.entry("object"):
            data = storage.read("object")
            assert data in {bytes([letter]) * OBJECT_BYTES for letter in b"abc"}
    assert leftovers, "no kill hit a write: the test showed nothing"
    storage.check()


def test_a_failed_write_leaves_the_old_object_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    storage = open_storage(str(tmp_path))
    storage.write("object", b"old")

    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage_file.os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"No space left.* GiB are free there. Make room"):
        storage.write("object", b"new")
    with pytest.raises(StorageError, match="No space left"):
        storage.create("another", b"new")
    monkeypatch.undo()
    assert storage.read("object") == b"old"
    assert os.listdir(tmp_path) == ["object"]


@pytest.fixture
def no_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(storage_file.os, "link", refuse)


@pytest.mark.usefixtures("no_hard_links")
def test_create_is_exclusive_without_hard_links_too(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    storage.check()
    assert storage.create("a/b", b"first")
    assert not storage.create("a/b", b"second")
    assert storage.read("a/b") == b"first"
    assert [entry.key for entry in storage.entries()] == ["a/b"]


@pytest.mark.usefixtures("no_hard_links")
def test_of_eight_threads_one_creates_without_hard_links(tmp_path: Path):
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    storage = open_storage(str(tmp_path))
    together = Barrier(8)

    def race(name: int) -> int:
        won = 0
        for number in range(20):
            together.wait()
            won += storage.create(f"object{number}", b"%d" % name)
        return won

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(race, range(8))) == 20


def test_another_reason_than_hard_links_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken_disk(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage_file.os, "link", broken_disk)
    with pytest.raises(StorageError, match="Input/output error"):
        open_storage(str(tmp_path)).create("object", b"")
    assert os.listdir(tmp_path) == []


def test_a_file_and_a_folder_of_one_name_are_told_apart(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    storage.write("name", b"")
    with pytest.raises(StorageError, match="a file and a folder want the same name"):
        storage.write("name/below", b"")
    storage.write("folder/object", b"")
    for use in (storage.read, storage.delete, lambda key: storage.write(key, b"")):
        with pytest.raises(StorageError, match="a file and a folder want the same name"):
            use("folder")
    assert storage.entry("folder") is None
    assert storage.entry("name/below") is None
    assert storage.entries("name") == []


def test_a_place_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The tests may run as root, whom no mode stops.
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(storage_file.Path, "mkdir", refuse)
    with pytest.raises(StorageError, match=r"not allowed to write it .* Change its owner or mode"):
        open_storage(str(tmp_path)).check()


def test_linked_folders_are_followed_and_loops_are_not(tmp_path: Path):
    images = tmp_path / "elsewhere"
    images.mkdir()
    (images / "cat.png").write_bytes(b"cat")
    store = tmp_path / "store"
    (store / "folder").mkdir(parents=True)
    (store / "folder" / "loop").symlink_to(store)
    (store / "one").symlink_to(images)
    (store / "two").symlink_to(images)
    (store / "broken").symlink_to(tmp_path / "nowhere")
    (store / ".DS_Store").write_bytes(b"hidden")
    (store / ".git").mkdir()
    (store / ".git" / "config").write_bytes(b"hidden")
    keys = [entry.key for entry in open_storage(str(store)).entries()]
    assert keys == ["one/cat.png", "two/cat.png"]


def test_a_scan_is_in_order_of_key_and_looks_into_one_folder_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    keys = [
        "a b/1",
        "a!",
        "a.txt",
        "a/b/c",
        "a/b-c/1",
        "a/b.txt",
        "a/b0",
        "a-/1",
        "a0",
        "😀",
        "\uffee",
    ]
    for key in keys:
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(b"")
    scan = open_storage(str(tmp_path)).scan()
    looked: list[str] = []
    real = os.scandir
    monkeypatch.setattr(
        storage_file.os, "scandir", lambda path: (looked.append(path), real(path))[1]
    )
    seen = [(next(scan).key, len(looked)) for _ in keys]
    assert [key for key, _ in seen] == sorted(keys)
    folders = [2, 2, 3, 3, 5, 5, 6, 6, 6, 6, 6]
    assert [count for _, count in seen] == folders


def test_a_file_deleted_during_a_scan_is_left_out(tmp_path: Path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"")
    scan = open_storage(str(tmp_path)).scan()
    assert next(scan).key == "a"
    (tmp_path / "b").unlink()
    assert [entry.key for entry in scan] == ["c"]


def test_a_name_that_is_not_utf8_is_left_out(tmp_path: Path):
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    (tmp_path / "good.png").write_bytes(b"")
    assert [entry.key for entry in open_storage(str(tmp_path)).entries()] == ["good.png"]


def test_objects_have_the_mode_of_ordinary_files(tmp_path: Path):
    # A shared disk has readers who are not the writer; temporary files are often 0600.
    (tmp_path / "ordinary").write_bytes(b"")
    storage = open_storage(str(tmp_path))
    storage.write("written", b"")
    storage.create("created", b"")
    modes = {file.name: file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1


def test_relative_paths_and_home_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_storage("a/../b").url == f"file://{tmp_path}/b"
    assert open_storage("~/b").url == f"file://{tmp_path}/home/b"
    assert open_storage("file:///a b%20c/").url == "file:///a b%20c"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
