"""Logs as numbered objects."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faultproxy import FaultProxy

from raylora.base import segments, storage_s3
from raylora.base.errors import StorageError
from raylora.base.segments import SegmentWriter, read_segments
from raylora.base.storage import Storage, open_storage


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The writer's clock; the test sets its only item."""
    now = [100.0]
    monkeypatch.setattr(segments.time, "monotonic", lambda: now[0])
    return now


def keys_of(storage: Storage) -> list[str]:
    return [entry.key for entry in storage.entries()]


def test_rows_come_back_in_order_with_their_attempt(storage: Storage):
    writer = SegmentWriter(storage, "runs/one/metrics", attempt=1)
    writer.add({"step": 1, "loss": 0.5, "text": "zwei\nZeilen 貓"})
    writer.add({"step": 2, "nested": {"list": [1, None, True]}})
    writer.flush()
    writer.add({"step": 3})
    writer.flush()
    assert keys_of(storage) == [
        "runs/one/metrics/0001-000000.jsonl",
        "runs/one/metrics/0001-000001.jsonl",
    ]
    assert read_segments(storage, "runs/one/metrics") == [
        {"step": 1, "loss": 0.5, "text": "zwei\nZeilen 貓", "attempt": 1},
        {"step": 2, "nested": {"list": [1, None, True]}, "attempt": 1},
        {"step": 3, "attempt": 1},
    ]


def test_a_folder_without_segments_has_no_rows(storage: Storage):
    storage.write("logs/readme.txt", b"no segment")
    assert read_segments(storage, "logs") == []
    assert read_segments(storage, "nothing") == []


def test_a_flush_of_nothing_writes_nothing(storage: Storage):
    writer = SegmentWriter(storage, "logs", attempt=1)
    writer.flush()
    writer.add({})
    writer.flush()
    writer.flush()
    assert keys_of(storage) == ["logs/0001-000000.jsonl"]


def test_rows_wait_until_the_time_has_passed(tmp_path: Path, clock: list[float]):
    storage = open_storage(str(tmp_path))
    writer = SegmentWriter(storage, "logs", attempt=1, every_seconds=10.0)
    clock[0] = 109.0
    writer.add({"step": 1})
    assert keys_of(storage) == []
    clock[0] = 110.0
    writer.add({"step": 2})
    assert [row["step"] for row in read_segments(storage, "logs")] == [1, 2]
    clock[0] = 119.0
    writer.add({"step": 3})
    assert len(keys_of(storage)) == 1


def test_a_row_is_taken_as_it_was_when_added(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    writer = SegmentWriter(storage, "logs", attempt=1)
    row = {"loss": 0.1 + 0.2}
    writer.add(row)
    row["loss"] = 0.0
    writer.add({"loss": math.nan, "worst": -math.inf})
    writer.flush()
    first, second = read_segments(storage, "logs")
    assert first["loss"] == 0.1 + 0.2
    assert math.isnan(second["loss"])
    assert second["worst"] == -math.inf


def test_a_new_attempt_touches_no_earlier_segment(storage: Storage):
    for attempt in (1, 2, 10, 10_000):
        writer = SegmentWriter(storage, "logs", attempt=attempt)
        for step in range(11):
            writer.add({"step": step})
            writer.flush()
    assert len(keys_of(storage)) == 44
    rows = [(row["attempt"], row["step"]) for row in read_segments(storage, "logs")]
    assert rows == [(attempt, step) for attempt in (1, 2, 10, 10_000) for step in range(11)]


def test_two_writers_of_one_attempt_are_an_error_and_lose_nothing(storage: Storage):
    first = SegmentWriter(storage, "logs", attempt=1)
    second = SegmentWriter(storage, "logs", attempt=1)
    first.add({"writer": 1})
    first.flush()
    second.add({"writer": 2})
    with pytest.raises(StorageError, match=r"000000.jsonl was written by someone else .*Stop one"):
        second.flush()
    assert [row["writer"] for row in read_segments(storage, "logs")] == [1]


def test_a_failed_write_raises_and_its_rows_come_with_the_next_flush(
    s3_url: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage_s3, "FIRST_WAIT_SECONDS", 0.001)
    writer = SegmentWriter(open_storage(s3_url), "logs", attempt=1, every_seconds=0.0)
    # The server stores the segment, and not one of six answers comes back.
    fault_proxy.fail_next(6, kind="reset_after", method="PUT")
    with pytest.raises(StorageError, match=r"logs/0001-000000.jsonl: could not write it, 6 times"):
        writer.add({"step": 1})
    fault_proxy.fail_next(6, kind="503", method="PUT")
    with pytest.raises(StorageError, match="503 SlowDown"):
        writer.add({"step": 2})
    writer.add({"step": 3})
    assert [row["step"] for row in read_segments(open_storage(s3_url), "logs")] == [1, 2, 3]


def test_a_row_that_is_not_json_is_refused_at_once(tmp_path: Path):
    writer = SegmentWriter(open_storage(str(tmp_path)), "logs", attempt=1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        writer.add({"tensor": object()})


def test_threads_share_a_writer(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    writer = SegmentWriter(storage, "logs", attempt=1, every_seconds=0.002)

    def add(thread: int) -> None:
        for number in range(50):
            writer.add({"thread": thread, "number": number})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    writer.flush()
    rows = read_segments(storage, "logs")
    for thread in range(4):
        numbers = [row["number"] for row in rows if row["thread"] == thread]
        assert numbers == list(range(50))


@pytest.mark.parametrize("damage", [b'{"step": 1}\n{"st', b"[1]\n", b"\xff\n"])
def test_a_damaged_segment_is_named_with_its_line(tmp_path: Path, damage: bytes):
    storage = open_storage(str(tmp_path))
    storage.write("logs/0001-000000.jsonl", damage)
    line = damage.count(b"\n", 0, -1) + 1
    with pytest.raises(StorageError, match=rf"0001-000000.jsonl: line {line} is no JSON object"):
        read_segments(storage, "logs")
