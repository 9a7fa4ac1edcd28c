"""Shards, index, range reads and the bounded local folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datafolders import CountingStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raylora.base.errors import DataError
from raylora.base.numbered import NumberedWriter
from raylora.base.storage import Storage, open_storage
from raylora.data.cache.index import CacheIndex, Spot, index_folder, index_segment
from raylora.data.cache.local import LocalCache
from raylora.data.cache.read import CacheReader
from raylora.data.cache.write import ShardWriter

FOLDER = "latents-0123456789abcdef"
ROW_BYTES = 4 * 16 * 16 * 4
GROUP_ROWS = 8
MANY = 1 << 30


def key_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def latents_of(number: int) -> NDArray[np.float32]:
    return np.random.default_rng(number).standard_normal((4, 16, 16), dtype=np.float32)


def write(storage: Storage, numbers: range, *, stem: str = "128x128", **tensors: Any) -> None:
    writer = ShardWriter(storage, FOLDER, stem, row_group_bytes=GROUP_ROWS * ROW_BYTES)
    for number in numbers:
        writer.add(key_of(number), {"latents": latents_of(number), **tensors}, {"n": number})
    writer.flush()


def fill(reader: CacheReader, numbers: range, max_bytes: int = MANY) -> int:
    """Bring entries to the local disk, and wait for them."""
    names = np.frombuffer(b"".join(map(key_of, numbers)), "S16")
    return reader.fill(names, max_bytes, threading.Event())


@pytest.mark.parametrize("filled", [False, True], ids=["one by one", "filled"])
def test_tensors_come_back_bit_equal(storage: Storage, tmp_path: Path, filled: bool):
    mask = np.array([True, False])
    half = np.float16([[1.5, np.nan]])
    write(storage, range(20), mask=mask, pooled=half, number=np.array(7, np.int64))
    reader = CacheReader(storage, FOLDER, tmp_path / "local", MANY)
    if filled:
        fill(reader, range(20))
    for number, got in zip([19, 3, 3], reader.get([key_of(n) for n in (19, 3, 3)]), strict=True):
        assert got["latents"].tobytes() == latents_of(number).tobytes()
        assert got["latents"].shape == (4, 16, 16)
        assert got["mask"].tolist() == [True, False]
        assert got["pooled"].tobytes() == half.tobytes()
        assert got["pooled"].dtype == np.float16
        assert got["number"].shape == ()
        assert got["number"] == 7


def test_a_shard_is_parquet_without_compression_or_dictionary_named_by_its_content(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    write(storage, range(20))
    (shard,) = storage.entries(f"{FOLDER}/shards")
    data = storage.read(shard.key)
    name = hashlib.blake2b(data, digest_size=16).hexdigest()
    assert shard.key == f"{FOLDER}/shards/128x128-{name}.parquet"
    file = pq.ParquetFile(tmp_path / shard.key)
    groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
    assert [group.num_rows for group in groups] == [8, 8, 4]
    columns = [group.column(c) for group in groups for c in range(group.num_columns)]
    assert {column.compression for column in columns} == {"UNCOMPRESSED"}
    assert not any(column.has_dictionary_page for column in columns)
    assert str(file.schema_arrow.field("latents").type) == "large_binary"
    facts = file.read(["facts"])["facts"].to_pylist()
    assert [json.loads(text)["n"] for text in facts] == list(range(20))


def test_the_default_row_group_has_4_to_8_mb(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    writer = ShardWriter(storage, FOLDER, "512x512")
    for number in range(200):
        writer.add(key_of(number), {"latents": np.zeros((4, 64, 64), np.float32)}, {})
    writer.flush()
    (shard,) = storage.entries(f"{FOLDER}/shards")
    first = pq.ParquetFile(tmp_path / shard.key).metadata.row_group(0)
    assert 4e6 <= first.total_byte_size <= 8e6


def test_filling_fetches_the_footer_and_the_row_groups_bytes_and_no_more(
    storage: Storage, tmp_path: Path
):
    write(storage, range(64))
    counting = CountingStorage(storage)
    reader = CacheReader(counting, FOLDER, tmp_path / "local", MANY)
    (shard,) = storage.entries(f"{FOLDER}/shards")
    counting.reads.clear()
    counting.read_bytes = 0
    fill(reader, range(8))  # all of one row group
    footer = min(64 * 2**10, shard.size_bytes)
    assert counting.reads == {shard.key: 2}
    assert counting.read_bytes - footer < 1.1 * GROUP_ROWS * ROW_BYTES < shard.size_bytes / 7
    reader.get([key_of(number) for number in range(8)])
    assert counting.reads == {shard.key: 2}
    fill(reader, range(9, 10))
    assert counting.reads == {shard.key: 3}
    again = CacheReader(counting, FOLDER, tmp_path / "local", MANY)
    again.get([key_of(0), key_of(9)])  # another process finds both on the disk
    assert counting.reads[shard.key] == 3


def test_an_entry_that_is_not_on_the_disk_is_read_by_itself(storage: Storage, tmp_path: Path):
    write(storage, range(64), pooled=np.arange(6.0))
    counting = CountingStorage(storage)
    reader = CacheReader(counting, FOLDER, tmp_path / "local", MANY)
    (shard,) = storage.entries(f"{FOLDER}/shards")
    counting.reads.clear()
    counting.read_bytes = 0
    reader.get([key_of(40), key_of(3), key_of(40)])
    assert counting.reads == {shard.key: 4}  # two entries of two tensors
    assert counting.read_bytes == 2 * (ROW_BYTES + 48)
    assert not list((tmp_path / "local").glob("*.arrow"))


def test_as_much_is_filled_as_there_is_room_for_and_the_rest_is_read(tmp_path: Path):
    storage = open_storage(str(tmp_path / "cache"))
    write(storage, range(64))
    counting = CountingStorage(storage)
    reader = CacheReader(counting, FOLDER, tmp_path / "local", MANY)
    room = 3 * (GROUP_ROWS * ROW_BYTES + 4096)
    held = fill(reader, range(64), room)
    assert 3 * GROUP_ROWS * ROW_BYTES <= held <= room
    assert len(list((tmp_path / "local").glob("*.arrow"))) == 3
    counting.reads.clear()
    for number, got in enumerate(reader.get([key_of(number) for number in range(64)])):
        assert got["latents"].tobytes() == latents_of(number).tobytes()
    assert sum(counting.reads.values()) == 64 - 3 * GROUP_ROWS
    stopped = threading.Event()
    stopped.set()
    assert reader.fill(np.frombuffer(key_of(40), "S16"), MANY, stopped) == 0


def test_arrays_are_views_of_the_mapped_file(tmp_path: Path):
    storage = open_storage(str(tmp_path / "cache"))
    write(storage, range(8))
    reader = CacheReader(storage, FOLDER, tmp_path / "local", MANY)
    fill(reader, range(8))
    one, two = reader.get([key_of(1), key_of(2)])
    address = [got["latents"].__array_interface__["data"][0] for got in (one, two)]
    assert address[1] - address[0] == ROW_BYTES
    assert not one["latents"].flags.writeable
    maps = Path("/proc/self/maps").read_text()
    (local,) = (tmp_path / "local").glob("*.arrow")
    assert str(local) in maps


def test_the_first_writer_of_a_key_wins(storage: Storage, tmp_path: Path):
    write(storage, range(4), who=np.array([1]))
    write(storage, range(2, 6), who=np.array([2]))
    reader = CacheReader(storage, FOLDER, tmp_path / "local", MANY)
    got = reader.get([key_of(number) for number in range(6)])
    assert [int(one["who"][0]) for one in got] == [1, 1, 1, 1, 2, 2]


def test_a_reader_finds_what_was_written_after_it_was_opened(storage: Storage, tmp_path: Path):
    write(storage, range(4))
    reader = CacheReader(storage, FOLDER, tmp_path / "local", MANY)
    write(storage, range(4, 8))
    assert len(reader.get([key_of(number) for number in range(8)])) == 8
    with pytest.raises(DataError, match="1 of 2 entries are not in the cache"):
        reader.get([key_of(1), key_of(99)])


def test_a_kill_between_shard_and_index_leaves_nothing_to_be_read(tmp_path: Path):
    storage = open_storage(str(tmp_path / "cache"))
    write(storage, range(4))
    (segment,) = storage.entries(index_folder(FOLDER))
    storage.delete(segment.key)
    assert not CacheIndex(storage, FOLDER).contains([key_of(0)]).any()
    write(storage, range(4))  # the same shard again, under the same name
    assert len(storage.entries(f"{FOLDER}/shards")) == 1
    assert CacheIndex(storage, FOLDER).contains([key_of(0)]).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.binary(min_size=16, max_size=16), max_size=12), max_size=5))
def test_the_index_is_a_dictionary_in_which_the_first_wins(
    tmp_path_factory: pytest.TempPathFactory, segments: list[list[bytes]]
):
    storage = open_storage(str(tmp_path_factory.mktemp("index")))
    writer = NumberedWriter(storage, index_folder(FOLDER), ".parquet")
    expected: dict[bytes, tuple[str, int, int]] = {}
    for number, keys in enumerate(segments):
        # Keys that end or begin in zeros are as good as any.
        keys = list(dict.fromkeys([*keys, bytes(16), bytes(15) + b"\1", b"\1" + bytes(15)]))
        spots = [{"x": Spot("uint8", (row,), 7 * row, row)} for row in range(len(keys))]
        writer.put(index_segment(f"shard-{number}", 10, keys, spots, group_rows=3))
        for row, key in enumerate(keys):
            expected.setdefault(key, (f"shard-{number}", row // 3, row % 3))
    index = CacheIndex(storage, FOLDER)
    assert len(index) == len(expected)
    places = index.find([*expected, b"no such key 1234"])
    assert places.pop() is None
    assert [(p.shard.key, p.group, p.row) for p in places if p] == list(expected.values())
    for place in filter(None, places):
        row = 3 * place.group + place.row
        assert place.spots() == {"x": Spot("uint8", (row,), 7 * row, row)}
    assert index.contains(list(expected)).all()


def local_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_the_local_folder_stays_within_its_bound(tmp_path: Path):
    storage = open_storage(str(tmp_path / "cache"))
    write(storage, range(64))
    bound = 3 * (GROUP_ROWS * ROW_BYTES + 4096)
    counting = CountingStorage(storage)
    reader = CacheReader(counting, FOLDER, tmp_path / "local", bound)
    fill(reader, range(1))
    held = reader.get([key_of(0)])[0]["latents"]
    for number in range(0, 64, 4):
        fill(reader, range(number, number + 1))
        (got,) = reader.get([key_of(number)])
        assert got["latents"].tobytes() == latents_of(number).tobytes()
        reader.get([key_of(0)])  # in use all the time, so never the oldest
        assert local_bytes(tmp_path / "local") <= bound
    assert len(list((tmp_path / "local").glob("*.arrow"))) == 3
    assert sum(counting.reads.values()) == 1 + 1 + 8  # index, footer, each group once
    assert held.tobytes() == latents_of(0).tobytes()


def test_a_group_larger_than_the_local_bound_is_served_all_the_same(tmp_path: Path):
    storage = open_storage(str(tmp_path / "cache"))
    write(storage, range(8))
    reader = CacheReader(storage, FOLDER, tmp_path / "local", 1000)
    assert fill(reader, range(8), 1000) == 0
    for number in range(8):
        (got,) = reader.get([key_of(number)])
        assert got["latents"].tobytes() == latents_of(number).tobytes()
    assert local_bytes(tmp_path / "local") == 0


def test_a_torn_local_file_is_fetched_again(tmp_path: Path):
    storage = open_storage(str(tmp_path / "cache"))
    write(storage, range(8))
    local = tmp_path / "local"
    fill(CacheReader(storage, FOLDER, local, MANY), range(1))
    (file,) = local.glob("*.arrow")
    file.write_bytes(b"")
    reader = CacheReader(storage, FOLDER, local, MANY)
    fill(reader, range(1))
    (got,) = reader.get([key_of(0)])
    assert file.stat().st_size > 0
    assert got["latents"].tobytes() == latents_of(0).tobytes()


def test_a_flipped_bit_in_a_shard_is_not_trained_on(tmp_path: Path):
    storage = open_storage(str(tmp_path / "cache"))
    write(storage, range(8))
    (shard,) = storage.entries(f"{FOLDER}/shards")
    data = bytearray(storage.read(shard.key))
    data[data.find(latents_of(0).tobytes()[:64]) + 7] ^= 1
    storage.write(shard.key, bytes(data))
    reader = CacheReader(storage, FOLDER, tmp_path / "local", MANY)
    with pytest.raises(DataError, match=r"is damaged .*Delete the folder"):
        reader.get([key_of(0)])
    with pytest.raises(DataError, match=r"is damaged .*Delete the folder"):
        fill(reader, range(1))
    assert reader.get([key_of(1)])[0]["latents"].tobytes() == latents_of(1).tobytes()


def test_temporary_files_of_killed_processes_are_cleared(tmp_path: Path):
    stale, young = tmp_path / ".tmp-1", tmp_path / ".tmp-2"
    stale.touch()
    young.touch()
    os.utime(stale, (1, 1))
    storage = open_storage(str(tmp_path / "cache"))
    write(storage, range(8))
    fill(CacheReader(storage, FOLDER, tmp_path, MANY), range(1))
    assert not stale.exists()
    assert young.exists()


def test_many_threads_read_the_same_numbers_and_fetch_a_group_once(tmp_path: Path):
    storage = open_storage(str(tmp_path / "cache"))
    write(storage, range(64))
    counting = CountingStorage(storage)
    reader = CacheReader(counting, FOLDER, tmp_path / "local", MANY)
    start = threading.Barrier(8)

    def read(thread: int) -> None:
        start.wait()
        order = np.random.default_rng(thread).permutation(64)
        for number in order.tolist():
            fill(reader, range(number, number + 1))
            (got,) = reader.get([key_of(number)])
            assert got["latents"].tobytes() == latents_of(number).tobytes()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert sum(counting.reads.values()) == 1 + 1 + 8  # index, footer, groups


CHILD = """
import hashlib, sys, threading
import numpy as np
from pathlib import Path
from raylora.base.storage import open_storage
from raylora.data.cache.read import CacheReader
url, folder, local, bound = sys.argv[1:]
reader = CacheReader(open_storage(url), folder, Path(local), int(bound))
keys = [hashlib.blake2b(str(n).encode(), digest_size=16).digest() for n in range(64)]
print("ready", flush=True)
for number in [*range(64), *reversed(range(64))]:
    reader.fill(np.frombuffer(keys[number], "S16"), 1 << 30, threading.Event())
    reader.get([keys[number]])
"""


@pytest.mark.slow
def test_processes_that_share_a_local_folder_keep_its_bound(tmp_path: Path):
    storage = open_storage(str(tmp_path / "cache"))
    write(storage, range(64))
    bound = 4 * (GROUP_ROWS * ROW_BYTES + 4096)
    local = tmp_path / "local"
    command = [sys.executable, "-c", CHILD, storage.url, FOLDER, str(local), str(bound)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    reader = CacheReader(storage, FOLDER, local, bound)
    for number in np.random.default_rng(0).permutation(64).tolist():
        fill(reader, range(number, number + 1))
        (got,) = reader.get([key_of(number)])
        assert got["latents"].tobytes() == latents_of(number).tobytes()
        with open(local / ".lock", "ab") as lock:  # hold still to be counted
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert sum(path.stat().st_size for path in local.glob("*.arrow")) <= bound
    assert child.wait() == 0


def test_a_local_table_is_replaced_by_nobody(tmp_path: Path):
    cache = LocalCache(tmp_path, MANY)
    assert cache.open("absent") is None
    assert not cache.touch("absent")
