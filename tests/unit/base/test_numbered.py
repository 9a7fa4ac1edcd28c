"""Objects numbered by exclusive creates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from raylora.base.numbered import NumberedWriter, list_numbered, read_numbered
from raylora.base.storage import Storage


def test_many_writers_leave_no_gap_and_lose_nothing(storage: Storage):
    def write(writer: int) -> None:
        log = NumberedWriter(storage, "log", ".txt")
        for number in range(4):
            log.put(f"{writer} {number}".encode())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    found = list(read_numbered(storage, "log"))
    assert [number for number, _ in found] == list(range(16))
    assert sorted(data for _, data in found) == sorted(
        f"{writer} {number}".encode() for writer in range(4) for number in range(4)
    )


def test_only_what_is_new_is_read(storage: Storage):
    writer = NumberedWriter(storage, "log", ".txt")
    assert [writer.put(data) for data in (b"a", b"b", b"c")] == [0, 1, 2]
    assert list(read_numbered(storage, "log", after=1)) == [(2, b"c")]
    assert list_numbered(storage, "log") == [
        (number, f"log/{number:08d}.txt") for number in range(3)
    ]
    assert NumberedWriter(storage, "log", ".txt").put(b"d") == 3
