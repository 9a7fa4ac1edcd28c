"""What earlier runs saw in a data folder, so that no file is fetched twice to learn the same.

Facts of a file are remembered by its size and tag (ETag or modification time) in numbered objects
of the cache, `sources-<hash of the folder's URL>/`; a later object overrules an earlier one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from raylora.base.storage import Entry, Storage
from raylora.data.bucket import Size
from raylora.data.numbered import NumberedWriter, read_numbered
from raylora.data.recipe import hash16

_FLUSH_ROWS = 4096
_FLUSH_SECONDS = 10.0
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("size_bytes", pa.int64()),
        ("tag", pa.string()),
        ("sha256", pa.binary(32)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("bad", pa.string()),
        ("judge", pa.string()),
    ]
)


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
    """First line of a caption file."""
    bad: str | None = None
    """Why it cannot be used."""
    judge: str = ""
    """Who found it bad: a decoder and its version, or the recipe whose encoder failed."""


def sources_folder(folder_url: str) -> str:
    """The cache folder of what is remembered of a data folder."""
    return f"sources-{hash16(folder_url.encode())}"


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
        self._judges = frozenset(judges)
        self._writer = NumberedWriter(cache, self._folder, ".parquet")
        self._lock = threading.Lock()
        self._seen: dict[str, Seen] = {}
        self._bad_bytes: dict[bytes, Seen] = {}
        self._new: list[Seen] = []
        self._flushed = time.monotonic()
        self._last = -1

    def load(self) -> None:
        """Take in what was put since the last look."""
        for number, data in read_numbered(self._cache, self._folder, after=self._last):
            for seen in _from_parquet(data):
                if seen.bad is None or seen.judge in self._judges:
                    self._take(seen)
            self._last = number

    def get(self, entry: Entry) -> Seen | None:
        """What is known of a file; None when it has changed or was never seen.

        A copy of a file that was found bad is bad too.
        """
        seen = self._seen.get(entry.key)
        if seen is None or (seen.size_bytes, seen.tag) != (entry.size_bytes, entry.tag):
            return None
        verdict = self._bad_bytes.get(seen.sha256)
        return replace(seen, bad=verdict.bad, judge=verdict.judge) if verdict else seen

    def add(self, seen: Seen) -> None:
        """Remember a file; put into the cache now and then, and at `flush`."""
        with self._lock:
            self._take(seen)
            self._new.append(seen)
            due = time.monotonic() - self._flushed >= _FLUSH_SECONDS
            if due or len(self._new) >= _FLUSH_ROWS:
                self._put()

    def flush(self) -> None:
        """Put what is new into the cache."""
        with self._lock:
            self._put()

    def _take(self, seen: Seen) -> None:
        verdict = self._bad_bytes.get(seen.sha256)
        if seen.bad is not None:
            self._bad_bytes[seen.sha256] = seen
        elif verdict and verdict.key == seen.key:  # looked at anew, by `--rehash`
            del self._bad_bytes[seen.sha256]
        self._seen[seen.key] = seen

    def _put(self) -> None:
        if self._new:
            self._writer.put(_to_parquet(self._new))
        self._new, self._flushed = [], time.monotonic()


def _to_parquet(rows: list[Seen]) -> bytes:
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
    arrays = [pa.array(values, kind) for values, kind in zip(columns, _SCHEMA.types, strict=True)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays, schema=_SCHEMA), sink)
    return bytes(sink.getvalue())


def _from_parquet(data: bytes) -> Iterable[Seen]:
    # Not read_table, which imports pandas: half a CPU second at every start.
    columns = pq.ParquetFile(pa.BufferReader(data)).read(columns=_SCHEMA.names).to_pydict()
    for key, size, tag, sha256, width, height, caption, bad, judge in zip(
        *columns.values(), strict=True
    ):
        yield Seen(key, size, tag, sha256, (width, height), caption, bad, judge)
