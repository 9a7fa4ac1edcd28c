"""Where each cached entry lies: (shard, row group, row) by its 16-byte key.

One index segment is put after each shard, under the next free number. The segment with the lowest
number wins a key, so that all readers take the same bytes whoever else encoded the entry too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raylora.base.numbered import read_numbered
from raylora.base.storage import Storage

INDEX_SUFFIX = ".parquet"
_KEY_BYTES = 16


def index_folder(recipe_folder: str) -> str:
    """The folder of a recipe's index segments."""
    return f"{recipe_folder}/index"


def index_segment(shard: str, size_bytes: int, keys: Sequence[bytes], group_rows: int) -> bytes:
    """The index of one shard as a Parquet file: its row groups hold `group_rows` rows each."""
    rows = np.arange(len(keys), dtype=np.int32)
    table = pa.table(
        {
            "key": pa.array(keys, pa.binary(_KEY_BYTES)),
            "group": pa.array(rows // group_rows),
            "row": pa.array(rows % group_rows),
        }
    ).replace_schema_metadata({"shard": shard, "size_bytes": str(size_bytes)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    return bytes(sink.getvalue())


@dataclass(frozen=True, slots=True)
class Shard:
    """One Parquet file of entries, by its key relative to the cache."""

    key: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """One row of a shard."""

    shard: Shard
    group: int
    row: int


class CacheIndex:
    """The index of one recipe folder, held as sorted arrays; safe to use from many threads."""

    def __init__(self, storage: Storage, recipe_folder: str) -> None:
        self._storage, self._folder = storage, index_folder(recipe_folder)
        self._lock = threading.Lock()
        self._last = -1
        self._shards: list[Shard] = []
        self._keys: NDArray[np.bytes_] = np.empty(0, f"S{_KEY_BYTES}")
        self._places: NDArray[np.int32] = np.empty((0, 3), np.int32)
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> None:
        """Take in the segments that were put since the last look."""
        with self._lock:
            keys, places = [self._keys], [self._places]
            for number, data in read_numbered(self._storage, self._folder, after=self._last):
                # Not read_table, which imports pandas: half a CPU second at every start.
                table = pq.ParquetFile(pa.BufferReader(data)).read()
                metadata = table.schema.metadata
                self._shards.append(
                    Shard(metadata[b"shard"].decode(), int(metadata[b"size_bytes"]))
                )
                keys.append(_key_array(table["key"].to_pylist()))
                places.append(_place_array(len(self._shards) - 1, table))
                self._last = number
            # np.unique names the first of equal keys: the one of the lowest segment.
            found, first = np.unique(np.concatenate(keys), return_index=True)
            self._keys, self._places = found, np.concatenate(places)[first]

    def contains(self, keys: Sequence[bytes] | NDArray[np.bytes_]) -> NDArray[np.bool_]:
        """Which of the keys are cached."""
        return self._positions(keys)[1]

    def find(self, keys: Sequence[bytes]) -> list[Place | None]:
        """Where each entry lies; None for those that are not cached."""
        with self._lock:
            positions, known = self._positions(keys)
            places = self._places[positions[known]].tolist()
        found = iter(Place(self._shards[shard], group, row) for shard, group, row in places)
        return [next(found) if here else None for here in known]

    def _positions(
        self, keys: Sequence[bytes] | NDArray[np.bytes_]
    ) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        wanted, have = _key_array(keys), self._keys
        if not len(have):
            return np.zeros(len(wanted), np.intp), np.zeros(len(wanted), np.bool_)
        positions = np.minimum(np.searchsorted(have, wanted), len(have) - 1)
        return positions, have[positions] == wanted


def _key_array(keys: Sequence[bytes] | NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    if isinstance(keys, np.ndarray):
        return keys
    return np.frombuffer(b"".join(keys), f"S{_KEY_BYTES}")


def _place_array(shard: int, table: pa.Table) -> NDArray[np.int32]:
    # Not to_numpy, which imports pandas too.
    group, row = (np.from_dlpack(table[name].combine_chunks()) for name in ("group", "row"))
    return np.stack([np.full_like(group, shard), group, row], axis=1)
