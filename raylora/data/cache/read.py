"""Reading entries from the cache: any of them at any step, without reading their neighbours twice.

Row groups are brought to the local disk ahead of need (`fill`), as many as fit, as memory-mapped
Arrow files whose tensors are views. An entry that is not there yet, or for which there is no room,
is read by itself: one ranged read for each of its tensors.
"""

from __future__ import annotations

import io
import threading
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raylora.base.errors import DataError
from raylora.base.storage import Storage
from raylora.data.cache.index import CacheIndex, Place, Shard, Spot
from raylora.data.cache.local import LocalCache

# A step of 8 images has some 16 tensors: one round trip of a distant store.
FETCHERS = 16
"""Threads of a reader that fetch entries."""
# Large enough for the footer of some hundred row groups, so that one read is enough.
_TAIL_BYTES = 64 * 2**10

GroupKey = tuple[Shard, int]
_FOOTER = -1  # in a group's place: the lock of a shard's footer


class CacheReader:
    """Entries of one recipe folder by key; safe to use from many threads.

    Args:
        storage: the cache.
        recipe_folder: `latents-…` or `text-…`, below it.
        local_dir: folder on this machine's disk, shared with other readers and processes.
        max_bytes: bound of that folder.
    """

    def __init__(
        self, storage: Storage, recipe_folder: str, local_dir: Path, max_bytes: int
    ) -> None:
        self.index = CacheIndex(storage, recipe_folder)
        self._storage, self._place = storage, f"{storage.url}/{recipe_folder}"
        self._local, self._max_bytes = LocalCache(local_dir, max_bytes), max_bytes
        self._lock = threading.Lock()
        self._busy: dict[GroupKey, threading.Lock] = defaultdict(threading.Lock)
        self._footers: dict[Shard, pq.FileMetaData] = {}
        self._open: OrderedDict[GroupKey, _Group] = OrderedDict()
        self._open_bytes = 0
        self._pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="cache-read")

    def get(self, keys: Sequence[bytes]) -> list[dict[str, NDArray[Any]]]:
        """The tensors of each entry, read-only; views of the local files where these are.

        Raises:
            DataError: an entry is not in the cache, or is damaged.
        """
        places = self._find(keys)
        wanted = dict.fromkeys((place.shard, place.group) for place in places)
        groups = {key: self._opened(key) or self._on_disk(key) for key in wanted}
        absent = dict.fromkeys(place for place in places if not groups[place.shard, place.group])
        spots = [(place.shard, spot) for place in absent for spot in place.spots().values()]
        arrays = iter(list(self._pool.map(lambda pair: self._read(*pair), spots)))
        alone = {place: {name: next(arrays) for name in place.spots()} for place in absent}
        found = []
        for place in places:
            group = groups[place.shard, place.group]
            found.append(group.row(place.row) if group else alone[place])
        return found

    def fill(self, keys: NDArray[np.bytes_], max_bytes: int, stop: threading.Event) -> int:
        """Bring the row groups of these entries to the local disk, as many as fit.

        Args:
            keys: names as one array, in any order.
            max_bytes: how much of the local disk they may take.
            stop: set by another thread to end it early.

        Returns:
            bytes that are there now, of these entries' groups.
        """
        held = 0
        for shard, group in self.index.groups(keys):
            if stop.is_set():
                break
            _, length = _byte_range(self._footer(shard), group)
            if held + length > max_bytes:
                break
            held += self._group((shard, group)).size_bytes
        return held

    def close(self) -> None:
        """Let go of the mapped files and of the threads."""
        self._pool.shutdown(cancel_futures=True)
        with self._lock:
            self._open.clear()
            self._open_bytes = 0

    def _find(self, keys: Sequence[bytes]) -> list[Place]:
        found = self.index.find(keys)
        if None in found:
            self.index.refresh()
            found = self.index.find(keys)
        places = [place for place in found if place is not None]
        if len(places) < len(found):
            raise DataError(
                f"{self._place}: {len(found) - len(places)} of {len(found)} entries are not in "
                "the cache. Run `raylora cache` with the same job to make them."
            )
        return places

    def _read(self, shard: Shard, spot: Spot) -> NDArray[Any]:
        """One tensor, by its bytes alone."""
        content = self._storage.read_range(shard.key, spot.offset, spot.size_bytes)
        if zlib.crc32(content) != spot.crc:
            raise self._damaged(shard, "the sum of its bytes is not that of the index")
        return np.frombuffer(content, spot.dtype).reshape(spot.shape)

    def _group(self, key: GroupKey) -> _Group:
        with self._lock:
            busy = self._busy[key]
        with busy:  # of several threads that want a group, one fetches it
            group = self._opened(key) or self._on_disk(key)
            if group is None:
                name = _local_name(key)
                group = self._keep_open(key, name, self._local.put(name, self._fetch(*key)))
        return group

    def _on_disk(self, key: GroupKey) -> _Group | None:
        name = _local_name(key)
        table = self._local.open(name)
        return None if table is None else self._keep_open(key, name, table)

    def _opened(self, key: GroupKey) -> _Group | None:
        with self._lock:
            group = self._open.get(key)
            if group is None:
                return None
            self._open.move_to_end(key)
            if not self._local.touch(group.name):
                # Another process needed the room; holding on would use the disk all the same.
                self._forget(key)
            return group

    def _keep_open(self, key: GroupKey, name: str, table: pa.Table) -> _Group:
        group = _Group(name, table)
        with self._lock:
            if key in self._open:  # another thread was as fast
                return self._open[key]
            self._open[key] = group
            self._open_bytes += group.size_bytes
            while self._open_bytes > self._max_bytes:
                self._forget(next(iter(self._open)))
        return group

    def _forget(self, key: GroupKey) -> None:
        self._open_bytes -= self._open.pop(key).size_bytes
        self._busy.pop(key, None)

    def _fetch(self, shard: Shard, group: int) -> pa.Table:
        footer = self._footer(shard)
        start, length = _byte_range(footer, group)
        content = self._storage.read_range(shard.key, start, length)
        window = pa.PythonFile(_Window(content, start, shard.size_bytes), mode="r")
        try:
            file = pq.ParquetFile(
                window, metadata=footer, pre_buffer=False, page_checksum_verification=True
            )
            columns = [name for name in file.schema_arrow.names if name not in {"key", "facts"}]
            return file.read_row_group(group, columns=columns, use_threads=False).combine_chunks()
        except (OSError, pa.ArrowInvalid) as error:
            raise self._damaged(shard, error) from error

    def _damaged(self, shard: Shard, reason: object) -> DataError:
        return DataError(
            f"{self._storage.url}/{shard.key} is damaged ({reason}). Delete the folder "
            f"{self._place} and run `raylora cache` to make it again."
        )

    def _footer(self, shard: Shard) -> pq.FileMetaData:
        """The shard's table of contents, read once: eight bytes from the end is its length."""
        with self._lock:
            busy = self._busy[shard, _FOOTER]
        with busy:
            if shard not in self._footers:
                self._footers[shard] = self._fetch_footer(shard)
            return self._footers[shard]

    def _fetch_footer(self, shard: Shard) -> pq.FileMetaData:
        size = shard.size_bytes
        length = min(_TAIL_BYTES, size)
        tail = self._storage.read_range(shard.key, size - length, length)
        needed = int.from_bytes(tail[-8:-4], "little") + 8
        if needed > length:
            tail = self._storage.read_range(shard.key, size - needed, needed)
        return pq.read_metadata(pa.PythonFile(_Window(tail, size - len(tail), size), mode="r"))


class _Group:
    """One row group, mapped: where each tensor's bytes begin is looked up once."""

    def __init__(self, name: str, table: pa.Table) -> None:
        self.name = name
        self.size_bytes = table.nbytes
        dtypes = [column for column in table.column_names if column.endswith(".dtype")]
        names = [column.removesuffix(".dtype") for column in dtypes]
        self._tensors = {name: _TensorColumn(table, name) for name in names}

    def row(self, number: int) -> dict[str, NDArray[Any]]:
        return {name: column.row(number) for name, column in self._tensors.items()}


class _TensorColumn:
    def __init__(self, table: pa.Table, name: str) -> None:
        # Not combine_chunks: it copies even a single chunk off the mapping.
        (values,) = table[name].chunks
        _, offsets, self._data = values.buffers()
        first = values.offset
        self._offsets = np.frombuffer(offsets, np.int64)[first : first + len(values) + 1]
        self._shapes = table[f"{name}.shape"].to_pylist()
        self._dtypes = table[f"{name}.dtype"].to_pylist()

    def row(self, number: int) -> NDArray[Any]:
        dtype, shape = np.dtype(self._dtypes[number]), self._shapes[number]
        start, end = self._offsets[number : number + 2].tolist()
        count = (end - start) // dtype.itemsize
        tensor = np.frombuffer(self._data, dtype, count, start).reshape(shape)
        # Others see the same bytes; those of a mapping could not be written anyway.
        tensor.flags.writeable = False
        return tensor


class _Window(io.RawIOBase):
    """A file of which only the bytes from `start` are here, for Parquet to read within."""

    def __init__(self, data: bytes, start: int, size_bytes: int) -> None:
        self._data, self._start, self._size, self._at = data, start, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        begin = self._at - self._start
        end = len(self._data) if size < 0 else begin + size
        outside = begin < 0 or end > len(self._data)
        assert not outside, "Parquet read outside its row group"
        self._at = self._start + end
        return self._data[begin:end]


def _local_name(key: GroupKey) -> str:
    return f"{PurePosixPath(key[0].key).stem}.{key[1]:05d}"


def _byte_range(footer: pq.FileMetaData, group: int) -> tuple[int, int]:
    """Start and length of a row group: from its first column's first page to its last's last."""
    columns = [footer.row_group(group).column(number) for number in range(footer.num_columns)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    ends = [
        start + column.total_compressed_size for start, column in zip(starts, columns, strict=True)
    ]
    return min(starts), max(ends) - min(starts)
