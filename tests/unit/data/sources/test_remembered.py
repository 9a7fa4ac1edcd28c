"""What is remembered of files: until they change, of the right judges, by many writers at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raylora.base.storage import Entry, Storage, open_storage
from raylora.data.sources import remembered
from raylora.data.sources.remembered import Seen, SourceMemory, sources_folder

FOLDER = sources_folder("file:///images")
ENTRIES = pa.schema([("key", pa.string()), ("size_bytes", pa.int64()), ("tag", pa.string())])


def seen(key: str = "a.png", sha: bytes = b"1", **more: Any) -> Seen:
    facts: dict[str, Any] = {"size_bytes": 100, "tag": "t", "size": (64, 80), **more}
    return Seen(key=key, sha256=sha.ljust(32, b"\0"), **facts)


def bad(key: str = "a.png", sha: bytes = b"1", *, judge: str = "me", **more: Any) -> Seen:
    return seen(key, sha, bad="truncated", judge=judge, **more)


def entry(key: str = "a.png", *, size_bytes: int = 100, tag: str = "t") -> Entry:
    return Entry(key, size_bytes, tag)


def asked(memory: SourceMemory, *entries: Entry) -> list[dict[str, Any]]:
    columns = {name: [getattr(one, name) for one in entries] for name in ENTRIES.names}
    found: list[dict[str, Any]] = memory.find(pa.table(columns, schema=ENTRIES)).to_pylist()
    return found


def put(cache: Storage, *all_seen: Seen) -> None:
    """One object of the memory, as an earlier run left it."""
    memory = SourceMemory(cache, FOLDER)
    for one in all_seen:
        memory.add(one)
    memory.flush()


def loaded(cache: Storage, *judges: str) -> SourceMemory:
    memory = SourceMemory(cache, FOLDER, judges or ("me",))
    memory.load()
    return memory


@pytest.fixture
def cache(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "cache"))


def test_what_was_seen_is_known_at_once_and_to_the_next_run(cache: Storage):
    memory = SourceMemory(cache, FOLDER)
    caption = seen("a.txt", caption="ein Bär\nzwei")
    for one in (seen(), caption):
        memory.add(one)
    expected = [
        {"sha256": b"1".ljust(32, b"\0"), "width": 64, "height": 80, "caption": None, "bad": None},
        {
            "sha256": b"1".ljust(32, b"\0"),
            "width": 64,
            "height": 80,
            "caption": "ein Bär\nzwei",
            "bad": None,
        },
    ]
    entries = [entry(), entry("a.txt")]
    assert asked(memory, *entries) == expected
    assert asked(loaded(cache), *entries)[0]["sha256"] is None  # not put yet
    memory.flush()
    assert asked(loaded(cache), *entries) == expected
    assert asked(loaded(cache), *reversed(entries)) == expected[::-1]


@pytest.mark.parametrize(
    "change", [{"size_bytes": 101}, {"tag": "u"}, {"tag": ""}, {"key": "b.png"}]
)
def test_a_file_of_another_size_tag_or_name_is_unknown(cache: Storage, change: dict[str, Any]):
    put(cache, bad(), seen("c.png"))
    other = Entry(**{"key": "a.png", "size_bytes": 100, "tag": "t", **change})
    memory = loaded(cache)
    first, second, third = asked(memory, other, entry("c.png"), entry())
    assert set(first.values()) == {None}
    assert second["sha256"] is not None
    assert third["bad"] == "truncated"
    assert memory.reasons([other])[0] is None
    assert memory.reasons([entry()])[0] == "truncated"


def test_a_later_object_overrules_an_earlier_one(cache: Storage):
    for number in range(3):
        put(cache, seen("a.png", b"%d" % number, tag=str(number)), seen(f"{number}.png"))
    memory = loaded(cache)
    shas = [one["sha256"] for one in asked(memory, *[entry(tag=str(n)) for n in range(3)])]
    assert shas == [None, None, b"2".ljust(32, b"\0")]
    assert all(one["sha256"] for one in asked(memory, *[entry(f"{n}.png") for n in range(3)]))
    # And what this run sees overrules all of them, put or not.
    memory.add(seen(sha=b"4", tag="4"))
    assert asked(memory, entry(tag="4"), entry(tag="2"))[1]["sha256"] is None
    memory.flush()
    memory.add(seen(sha=b"5", tag="5"))
    found = [one["sha256"] is not None for one in asked(memory, entry(tag="4"), entry(tag="5"))]
    assert found == [False, True]


def test_objects_are_taken_in_by_number_and_only_once(
    cache: Storage, monkeypatch: pytest.MonkeyPatch
):
    for number in range(12):  # beyond nine, where names sort otherwise than numbers
        put(cache, seen(tag=str(number)))
    memory = loaded(cache)
    assert asked(memory, entry(tag="11"))[0]["sha256"] is not None
    put(cache, seen("b.png"), seen(tag="12"))
    memory.load()
    assert [one["sha256"] is None for one in asked(memory, entry("b.png"), entry(tag="12"))] == [
        False,
        False,
    ]
    reads: list[str] = []
    read = type(cache).read
    monkeypatch.setattr(type(cache), "read", lambda *a: (reads.append(a[1]), read(*a))[1])
    memory.load()
    assert reads == []


def test_verdicts_of_other_judges_do_not_count(cache: Storage):
    put(cache, seen())
    put(cache, bad(judge="pillow 1"), bad("b.png", b"2", judge="pillow 1"))
    assert loaded(cache, "pillow 1", "vae").reasons([entry()])[0] == "truncated"
    other = loaded(cache, "pillow 2", "vae")
    assert other.reasons([entry()])[0] is None
    # What was seen before the verdict counts still; a file of which there is nothing else is new.
    first, second = asked(other, entry(), entry("b.png"))
    assert first["sha256"] is not None
    assert second["sha256"] is None
    assert SourceMemory(cache, FOLDER).reasons([entry()])[0] is None


def test_another_judge_does_not_clear_ours(cache: Storage):
    put(cache, bad(judge="me"))
    put(cache, bad(judge="other"))
    assert loaded(cache).reasons([entry()])[0] == "truncated"


def test_a_copy_of_a_bad_file_is_bad_whichever_was_seen_first(cache: Storage):
    put(cache, seen("first.png"), seen("other.png", b"2"))
    put(cache, bad())
    put(cache, seen("last.png"))
    memory = loaded(cache)
    reasons = [
        memory.reasons([entry(f"{name}.png")])[0] for name in ("first", "a", "last", "other")
    ]
    assert reasons == ["truncated"] * 3 + [None]


def test_a_caption_is_not_bad_because_an_image_of_the_same_bytes_is(cache: Storage):
    """A download may leave the same text in both."""
    put(cache, bad("a.png", b"cat"), seen("b.txt", b"cat", caption="cat"))
    memory = loaded(cache)
    assert memory.reasons([entry()])[0] == "truncated"
    assert memory.reasons([entry("b.txt")])[0] is None


def test_a_good_look_after_a_bad_one_clears_the_file_and_its_copies(cache: Storage):
    put(cache, bad(), seen("copy.png"))
    assert loaded(cache).reasons([entry("copy.png")])[0] == "truncated"
    put(cache, seen())
    memory = loaded(cache)
    assert [memory.reasons([entry(key)])[0] for key in ("a.png", "copy.png")] == [None, None]
    put(cache, bad())
    assert loaded(cache).reasons([entry()])[0] == "truncated"


def test_folders_do_not_know_of_each_other(cache: Storage):
    put(cache, seen())
    assert sources_folder("file:///images") == FOLDER
    other = SourceMemory(cache, sources_folder("file:///images2"), ("me",))
    other.load()
    assert asked(other, entry())[0]["sha256"] is None


def test_nothing_is_asked_and_nothing_is_found(cache: Storage):
    assert asked(loaded(cache)) == []
    assert asked(loaded(cache), entry())[0] == dict.fromkeys(
        ("sha256", "width", "height", "caption", "bad")
    )
    SourceMemory(cache, FOLDER).flush()
    assert cache.entries() == []


def test_what_is_new_is_put_now_and_then(cache: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remembered, "_FLUSH_ROWS", 3)
    memory = SourceMemory(cache, FOLDER)
    for number in range(7):
        memory.add(seen(f"{number}.png"))
    assert len(cache.entries()) == 2  # the seventh is lost with a kill now, and looked at again
    monkeypatch.setattr(remembered, "_FLUSH_SECONDS", 0.0)
    memory.add(seen("8.png"))
    assert len(cache.entries()) == 3
    memory.flush()
    assert len(cache.entries()) == 3


def test_threads_add_and_ask_at_once(cache: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remembered, "_FLUSH_ROWS", 16)
    memories = [SourceMemory(cache, FOLDER) for _ in range(2)]

    def work(memory: SourceMemory, name: int) -> None:
        for number in range(40):
            memory.add(seen(f"{name}-{number}.png"))
            if number % 8 == 0:
                assert asked(memory, entry(f"{name}-{number}.png"))[0]["sha256"]

    threads = [
        threading.Thread(target=work, args=(memory, 2 * at + part))
        for at, memory in enumerate(memories)
        for part in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for memory in memories:
        memory.flush()
    every = [entry(f"{name}-{number}.png") for name in range(4) for number in range(40)]
    assert all(one["sha256"] for one in asked(loaded(cache), *every))


WRITER = """
import sys
from raylora.base.storage import open_storage
from raylora.data.sources import remembered
remembered._FLUSH_ROWS = 5
memory = remembered.SourceMemory(open_storage(sys.argv[1]), sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    memory.add(remembered.Seen(f"{sys.argv[3]}-{number}.png", 100, "t", bytes(32), (64, 80)))
memory.flush()
"""


@pytest.mark.slow
def test_two_processes_write_at_once_and_nothing_is_lost(cache: Storage):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, cache.url, FOLDER, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n")
        assert writer.returncode == 0
    every = [entry(f"{name}-{number}.png") for name in "ab" for number in range(100)]
    assert all(one["sha256"] for one in asked(loaded(cache), *every))
    numbers = sorted(int(one.key[-16:-8]) for one in cache.entries())
    assert numbers == list(range(40))


MILLION = """
import resource, sys, time
import numpy as np, pyarrow as pa
from raylora.base.storage import open_storage
from raylora.data.sources.remembered import SourceMemory
memory = SourceMemory(open_storage(sys.argv[1]), sys.argv[2], ("me",))
entries = pa.table({
    "key": [f"images/of some folder/{n:07d}.png" for n in range(1_000_000)],
    "size_bytes": np.full(1_000_000, 100), "tag": ["1700000000000000000"] * 1_000_000,
})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
memory.load()
found = memory.find(entries)
print(time.perf_counter() - began, found["sha256"].null_count, found["bad"].null_count)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_million_files_are_found_in_seconds_and_within_a_gigabyte(
    cache: Storage, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remembered, "_FLUSH_ROWS", 50_000)
    monkeypatch.setattr(remembered, "_FLUSH_SECONDS", 1e9)
    memory = SourceMemory(cache, FOLDER)
    sha = b"%032d"
    for n in range(1_000_000):
        key = f"images/of some folder/{n:07d}.png"
        facts = ("truncated", "me") if n % 1000 == 7 else (None, "")
        memory.add(Seen(key, 100, "1700000000000000000", sha % n, (64, 80), None, *facts))
    memory.flush()
    began = time.perf_counter()
    child = subprocess.run(
        [sys.executable, "-c", MILLION, cache.url, FOLDER], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    seconds, unknown, good, more_kib = map(float, child.stdout.split())
    assert (unknown, good) == (0, 999_000)
    assert seconds < 15, time.perf_counter() - began  # 2 s alone
    assert more_kib < 2**20
