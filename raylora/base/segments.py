"""Logs, events and metrics in a storage whose objects cannot be appended to.

Rows gather in memory and are written now and then as one numbered object of JSON lines. Each start
of a run is an attempt of its own, so a resumed run never touches what an earlier one wrote.
"""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raylora.base.errors import StorageError
from raylora.base.storage import Storage

_NAME = re.compile(r"(\d{4,})-(\d{6,})\.jsonl")
_READERS = 8  # requests wait on the network, not on the CPU


class SegmentWriter:
    """Writes rows as `<folder>/<attempt>-<number>.jsonl`; safe to use from several threads.

    Args:
        attempt: this start of the run, larger than every earlier one's; two writers of one attempt
            in one folder are an error.
        every_seconds: how much may be lost in a crash.
    """

    def __init__(
        self, storage: Storage, folder: str, *, attempt: int, every_seconds: float = 10.0
    ) -> None:
        self._storage = storage
        self._folder = folder
        self._attempt = attempt
        self._every_seconds = every_seconds
        self._lines: list[str] = []
        self._sealed = b""  # a segment whose write has not succeeded yet
        self._number = 0
        self._last_flush = time.monotonic()
        self._lock = threading.Lock()

    def add(self, row: dict[str, Any]) -> None:
        """Take a row, as it is now; written with the others once `every_seconds` have passed.

        NaN and infinities are kept, as Python's json writes them.

        Raises:
            StorageError: the write that was due failed; the row is kept for the next one.
            TypeError: the row holds something that JSON has no word for.
        """
        line = json.dumps(row, separators=(",", ":")) + "\n"
        with self._lock:
            self._lines.append(line)
            if time.monotonic() - self._last_flush >= self._every_seconds:
                self._flush()

    def flush(self) -> None:
        """Write what is waiting; nothing when nothing is.

        Raises:
            StorageError: it could not be written; it is kept, and the next flush tries again.
        """
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        while self._sealed or self._lines:
            if not self._sealed:
                self._sealed = "".join(self._lines).encode()
                self._lines.clear()
            self._write_sealed()
            self._sealed = b""
            self._number += 1
        self._last_flush = time.monotonic()

    def _write_sealed(self) -> None:
        key = f"{self._folder}/{self._attempt:04d}-{self._number:06d}.jsonl"
        created = self._storage.create(key, self._sealed)
        # An earlier flush may have written it and failed only in hearing so.
        if not created and self._storage.read(key) != self._sealed:
            raise StorageError(
                f"{self._storage.url}/{key} was written by someone else as attempt "
                f"{self._attempt}. Is the same run going on elsewhere? Stop one of the two."
            )


def read_segments(storage: Storage, folder: str) -> list[dict[str, Any]]:
    """All rows of a folder in the order they were added, each with its "attempt".

    Rows of a later attempt come after all of an earlier one's, also where a run resumed from a
    checkpoint and did some steps twice.

    Raises:
        StorageError: a segment is not JSON lines.
    """
    names = [entry.key for entry in storage.entries(folder)]
    found = [(_NAME.fullmatch(name.rpartition("/")[2]), name) for name in names]
    ordered = sorted((int(match[1]), int(match[2]), name) for match, name in found if match)
    with ThreadPoolExecutor(_READERS) as pool:
        contents = pool.map(storage.read, [name for _, _, name in ordered])
        return [
            row | {"attempt": attempt}
            for (attempt, _, name), data in zip(ordered, contents, strict=True)
            for row in _rows(f"{storage.url}/{name}", data)
        ]


def _rows(place: str, data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise StorageError(
                f"{place}: line {number} is no JSON object. The file was changed by hand; mend the "
                "line, or delete the file and lose its rows."
            )
        rows.append(row)
    return rows
