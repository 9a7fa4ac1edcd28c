"""Names and sizes of a million files as Arrow columns: some 100 bytes each, not a kilobyte.

`pa.array` is not called here: it imports pandas, half a CPU second at every start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import le
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raylora.base.columns import Column, is_set, one_chunk
from raylora.base.storage import Entry

_CHUNK = 2**15
_COLUMNS = ["key", "size_bytes", "tag"]
_NO_ROWS = np.empty(0, np.int32)


class FileColumns:
    """Files gathered into a table: key (string, sorted by code point), size_bytes (int64), tag
    (string). All but the last few thousand are held as Arrow chunks."""

    def __init__(self) -> None:
        self._chunks: list[pa.RecordBatch] = []
        self._entries: list[Entry] = []
        self._last_key = ""
        self._sorted = True

    def add(self, entry: Entry) -> None:
        """Take a file in."""
        self._entries.append(entry)
        if len(self._entries) == _CHUNK:
            self._cut()

    def table(self) -> pa.Table:
        """All files that were taken in."""
        if self._entries or not self._chunks:
            self._cut()
        table = pa.Table.from_batches(self._chunks)
        # Some stores list `cat/x` before `cat-2/x`.
        return table if self._sorted else table.sort_by("key")

    def _cut(self) -> None:
        entries, self._entries = self._entries, []
        keys = [entry.key for entry in entries]
        self._sorted &= all(map(le, [self._last_key, *keys], keys))
        self._last_key = keys[-1] if keys else ""
        sizes = numbers(np.array([entry.size_bytes for entry in entries], np.int64))
        columns = [strings(keys), sizes, strings([entry.tag for entry in entries])]
        self._chunks.append(pa.RecordBatch.from_arrays(columns, _COLUMNS))


class Names:
    """Finds names among a million others, a chunk at a time.

    A hash of them all would take more memory than they do. Nearly all are sorted, so nearly all
    chunks can be passed over by their lowest and highest name.

    Args:
        names: those that are looked into.
        cut: makes what is looked for of a chunk of names, such as names without their endings.
    """

    def __init__(
        self, names: pa.ChunkedArray, cut: Callable[[pa.Array], pa.Array] = lambda chunk: chunk
    ) -> None:
        self._cut = cut
        self._chunks: list[tuple[int, str, str, pa.Array]] = []
        start = 0
        for chunk in names.chunks:
            if len(chunk):
                self._chunks.append((start, *_bounds(cut(chunk)), chunk))
            start += len(chunk)

    def find_all(self, wanted: pa.ChunkedArray) -> NDArray[np.int32]:
        """As `find`, for a whole column."""
        return np.concatenate([_NO_ROWS, *map(self.find, wanted.chunks)])

    def find(self, wanted: pa.Array) -> NDArray[np.int32]:
        """The first row that has each name; -1 where none has."""
        rows = np.full(len(wanted), -1, np.int32)
        if not len(wanted):
            return rows
        low, high = _bounds(wanted)
        for start, first, last, chunk in self._chunks:
            if low <= last and first <= high:
                found = positions(wanted, self._cut(chunk))
                rows = np.where((rows < 0) & (found >= 0), found + np.int32(start), rows)
        return rows


def image_stems(keys: Column) -> Column:
    """Names of images without their endings."""
    return pc.replace_substring_regex(keys, r"\.[^./]*$", "")


def strings(values: Sequence[str]) -> pa.Array:
    """A string column."""
    joined = "".join(values)
    data = joined.encode()
    parts: Sequence[str | bytes] = values
    if len(data) != len(joined):
        parts = [value.encode() for value in values]
    return _from_parts(pa.string(), np.int32, parts, data, None)


def texts(values: Sequence[bytes | None]) -> pa.Array:
    """A large_string column of UTF-8; None is null."""
    parts = [value or b"" for value in values]
    valid = None if None not in values else _bits(np.array([v is not None for v in values]))
    return _from_parts(pa.large_string(), np.int64, parts, b"".join(parts), valid)


def _from_parts(
    kind: pa.DataType,
    offset: type[np.integer[Any]],
    parts: Sequence[str | bytes],
    data: bytes,
    valid: pa.Buffer | None,
) -> pa.Array:
    offsets = np.zeros(len(parts) + 1, offset)
    np.cumsum(np.fromiter(map(len, parts), offset, len(parts)), out=offsets[1:])
    buffers = [valid, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(kind, len(parts), buffers)


def _bounds(values: pa.Array) -> tuple[str, str]:
    bounds = pc.min_max(values).as_py()
    return bounds["min"], bounds["max"]


def numbers(values: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> pa.Array:
    """A column of numbers, null where `valid` is not set."""
    kind = pa.from_numpy_dtype(values.dtype)
    mask = None if valid is None or valid.all() else _bits(valid)
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(kind, len(values), [mask, data])


def flags(values: NDArray[np.bool_]) -> pa.Array:
    """A column of truth values, to filter by."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, _bits(values)])


def truths(column: Column) -> NDArray[np.bool_]:
    """A column of truth values without nulls."""
    array = one_chunk(column)
    bits = np.unpackbits(np.frombuffer(array.buffers()[1] or b"", np.uint8), bitorder="little")
    return bits[array.offset :][: len(array)].astype(np.bool_)


def positions(values: Column, among: Column) -> NDArray[np.int32]:
    """Where each string is found among others, the first time; -1 where it is not."""
    found = one_chunk(pc.index_in(values, value_set=among))
    data = np.frombuffer(found.buffers()[1] or b"", np.int32)[found.offset :][: len(found)]
    return np.where(is_set(found), data, np.int32(-1))


def keep(table: pa.Table, chosen: NDArray[np.bool_]) -> pa.Table:
    """The rows that are chosen; the table itself when all are."""
    return table if chosen.all() else table.filter(flags(chosen))


def _bits(values: NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))
