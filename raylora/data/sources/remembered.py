"""What earlier runs saw in a data folder, so that no file is fetched twice to learn the same.

Facts of a file are remembered by its size and tag (ETag or modification time) in numbered objects
of the cache, `sources-<hash of the folder's URL>/`; a later object overrules an earlier one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raylora.base.columns import as_numpy
from raylora.base.numbered import NumberedWriter, read_numbered
from raylora.base.storage import Entry, Storage
from raylora.data.cache.recipe import hash16
from raylora.data.pixels.bucket import Size

_FLUSH_ROWS = 4096
_FLUSH_SECONDS = 10.0
# Raised when what is remembered of a file changes: version 2 holds whole caption files.
_FORMAT = 2
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("size_bytes", pa.int64()),
        ("tag", pa.string()),
        ("sha256", pa.binary(32)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.large_string()),
        ("bad", pa.string()),
        ("judge", pa.string()),
    ]
)
"""Columns of what is remembered."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one file held when it had this size and tag."""

    key: str
    size_bytes: int
    tag: str
    sha256: bytes
    size: Size = (0, 0)
    """Width and height of an image."""
    caption: str | None = None
    """What a caption file says."""
    bad: str | None = None
    """Why it cannot be used."""
    judge: str = ""
    """Who found it bad: a decoder and its version, or the recipe whose encoder failed."""


def sources_folder(folder_url: str) -> str:
    """The cache folder of what is remembered of a data folder."""
    return f"sources-{hash16(f'{_FORMAT} {folder_url}'.encode())}"


class SourceMemory:
    """The remembered facts of one data folder; `add` is safe to call from many threads.

    Args:
        cache: where the memory is kept.
        folder: `sources_folder` of the data folder.
        judges: whose verdicts of "bad" count; others are as if never given, so that a file is
            tried again after the decoder was updated.
    """

    def __init__(self, cache: Storage, folder: str, judges: Iterable[str] = ()) -> None:
        self._cache, self._folder = cache, folder
        self._judges = pa.array(sorted(judges), pa.string())
        self._writer = NumberedWriter(cache, self._folder, ".parquet")
        self._lock = threading.Lock()
        self._known = SCHEMA.empty_table()
        self._later: list[pa.Table] = []  # oldest first, not merged into `_known` yet
        self._new: dict[str, Seen] = {}
        self._flushed = time.monotonic()
        self._last = -1

    def load(self) -> None:
        """Take in what was put since the last look."""
        with self._lock:
            for number, data in read_numbered(self._cache, self._folder, after=self._last):
                # Not read_table: it reads the schema of a whole data set first.
                table = pq.ParquetFile(pa.BufferReader(data)).read(columns=SCHEMA.names)
                judged = pc.or_(pc.is_null(table["bad"]), pc.is_in(table["judge"], self._judges))
                self._later.append(table.filter(judged).cast(SCHEMA))
                self._last = number

    def find(self, entries: pa.Table) -> pa.Table:
        """What is known of files: a row for each, null where one has changed or was never seen.

        A copy of an image that was found bad is bad too.

        Args:
            entries: columns key, size_bytes and tag.

        Returns:
            columns sha256, width, height, caption and bad.
        """
        known = self._merged()
        at = pc.index_in(entries["key"], value_set=known["key"])
        same = pc.and_(
            pc.equal(known["size_bytes"].take(at), entries["size_bytes"]),
            pc.equal(known["tag"].take(at), entries["tag"]),
        )
        at = pc.if_else(same, at, pa.scalar(None, pa.int32()))
        found = known.select(["sha256", "width", "height", "caption", "bad"]).take(at)
        verdicts = known.filter(pc.is_valid(known["bad"]))
        copies = pc.index_in(found["sha256"], value_set=verdicts["sha256"])
        # Text that makes no image may make a caption all the same.
        copies = pc.if_else(pc.is_null(found["caption"]), copies, pa.scalar(None, pa.int32()))
        bad = pc.coalesce(found["bad"], verdicts["bad"].take(copies))
        return found.set_column(4, "bad", bad)

    def reasons(self, entries: Sequence[Entry | None]) -> list[str | None]:
        """Why files cannot be used, where that is known of them as they are now."""
        there = [entry or Entry("", 0, "") for entry in entries]
        table = pa.table(
            {
                "key": [entry.key for entry in there],
                "size_bytes": [entry.size_bytes for entry in there],
                "tag": [entry.tag for entry in there],
            },
            schema=pa.schema([SCHEMA.field(name) for name in ("key", "size_bytes", "tag")]),
        )
        found: list[str | None] = self.find(table)["bad"].to_pylist()
        return found

    def add(self, seen: Seen) -> None:
        """Remember a file; put into the cache now and then, and at `flush`."""
        with self._lock:
            self._new[seen.key] = seen
            due = time.monotonic() - self._flushed >= _FLUSH_SECONDS
            if due or len(self._new) >= _FLUSH_ROWS:
                self._put()

    def flush(self) -> None:
        """Put what is new into the cache."""
        with self._lock:
            self._put()

    def _put(self) -> None:
        if self._new:
            table = _table(list(self._new.values()))
            self._later.append(table)
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink)
            self._writer.put(bytes(sink.getvalue()))
        self._new, self._flushed = {}, time.monotonic()

    def _merged(self) -> pa.Table:
        """The newest facts of every file."""
        with self._lock:
            later = [*self._later, *([_table(list(self._new.values()))] if self._new else [])]
            if later:
                self._known = _newest(pa.concat_tables([*reversed(later), self._known]))
                self._later = []
            return self._known


def _newest(rows: pa.Table) -> pa.Table:
    """The first row of each key, of rows whose newest come first."""
    first: NDArray[np.int32] = as_numpy(pc.index_in(rows["key"], value_set=rows["key"]))
    kept = first == np.arange(len(first))
    return rows if kept.all() else rows.filter(pa.array(kept))


def _table(rows: list[Seen]) -> pa.Table:
    columns = [
        [seen.key for seen in rows],
        [seen.size_bytes for seen in rows],
        [seen.tag for seen in rows],
        [seen.sha256 for seen in rows],
        [seen.size[0] for seen in rows],
        [seen.size[1] for seen in rows],
        [seen.caption for seen in rows],
        [seen.bad for seen in rows],
        [seen.judge for seen in rows],
    ]
    arrays = [pa.array(values, kind) for values, kind in zip(columns, SCHEMA.types, strict=True)]
    return pa.table(arrays, schema=SCHEMA)
