"""Objects numbered in the order they were put: a log that many writers share.

Each number is taken by an exclusive create, one after the other, so there are never gaps, all
readers see the same prefix in the same order, and "the first one wins" means the same to all.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from raylora.base.storage import Storage

_READERS = 16


def list_numbered(storage: Storage, folder: str, *, after: int = -1) -> list[tuple[int, str]]:
    """(number, key) of the objects in a folder above `after`, in order."""
    found = [(_number(entry.key), entry.key) for entry in storage.entries(folder)]
    return sorted((number, key) for number, key in found if number > after)


def read_numbered(storage: Storage, folder: str, *, after: int = -1) -> Iterable[tuple[int, bytes]]:
    """(number, content) of the objects above `after`, in order; fetched several at a time."""
    listed = list_numbered(storage, folder, after=after)
    if not listed:
        return
    with ThreadPoolExecutor(min(_READERS, len(listed))) as pool:
        contents = pool.map(storage.read, [key for _, key in listed])
        yield from zip([number for number, _ in listed], contents, strict=True)


class NumberedWriter:
    """Puts objects into a folder under the next free number, beside any other writers."""

    def __init__(self, storage: Storage, folder: str, suffix: str) -> None:
        self._storage, self._folder, self._suffix = storage, folder, suffix
        self._next: int | None = None

    def put(self, data: bytes) -> int:
        """Write one object whole; the number it got."""
        if self._next is None:
            listed = list_numbered(self._storage, self._folder)
            self._next = listed[-1][0] + 1 if listed else 0
        number = self._next
        while not self._storage.create(f"{self._folder}/{number:08d}{self._suffix}", data):
            number += 1
        self._next = number + 1
        return number


def _number(key: str) -> int:
    stem = PurePosixPath(key).stem
    return int(stem) if stem.isdigit() else -1
