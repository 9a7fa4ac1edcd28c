"""Where each cached entry lies: (shard, row group, row) by its 16-byte key, and its tensors' bytes.

One index segment is put after each shard, under the next free number. The segment with the lowest
number wins a key, so that all readers take the same bytes whoever else encoded the entry too.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raylora.base.columns import as_numpy, one_chunk
from raylora.base.numbered import read_numbered
from raylora.base.storage import Storage

INDEX_SUFFIX = ".parquet"
_KEY_BYTES = 16


def index_folder(recipe_folder: str) -> str:
    """The folder of a recipe's index segments."""
    return f"{recipe_folder}/index"


@dataclass(frozen=True, slots=True)
class Spot:
    """Where the bytes of one tensor lie in the shard's file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    crc: int
    """CRC-32 of the bytes."""

    @property
    def size_bytes(self) -> int:
        """How many bytes they are."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


Spots = dict[str, Spot]
"""The tensors of an entry by name; all entries of a shard have the same names."""


def index_segment(
    shard: str, size_bytes: int, keys: Sequence[bytes], spots: Sequence[Spots], group_rows: int
) -> bytes:
    """The index of one shard as a Parquet file: its row groups hold `group_rows` rows each."""
    rows = np.arange(len(keys), dtype=np.int32)
    forms = [json.dumps({name: [at.dtype, at.shape] for name, at in one.items()}) for one in spots]
    columns = {
        "key": pa.array(keys, pa.binary(_KEY_BYTES)),
        "group": pa.array(rows // group_rows),
        "row": pa.array(rows % group_rows),
        "form": pa.array(forms, pa.string()),
    }
    for number, name in enumerate(spots[0] if spots else ()):
        columns[f"offset.{number}"] = pa.array([one[name].offset for one in spots], pa.int64())
        columns[f"crc.{number}"] = pa.array([one[name].crc for one in spots], pa.int64())
    table = pa.table(columns).replace_schema_metadata(
        {"shard": shard, "size_bytes": str(size_bytes)}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=["form"], write_statistics=False)
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
    form: str
    """Names, dtypes and shapes of its tensors, as JSON."""
    offsets: tuple[int, ...]
    crcs: tuple[int, ...]

    def spots(self) -> Spots:
        """Where each of its tensors lies."""
        names = json.loads(self.form).items()
        places = zip(names, self.offsets, self.crcs, strict=False)  # others may have more tensors
        return {
            name: Spot(dtype, tuple(shape), offset, crc)
            for (name, (dtype, shape)), offset, crc in places
        }


class CacheIndex:
    """The index of one recipe folder, held as sorted arrays; safe to use from many threads."""

    def __init__(self, storage: Storage, recipe_folder: str) -> None:
        self._storage, self._folder = storage, index_folder(recipe_folder)
        self._lock = threading.Lock()
        self._last = -1
        self._shards: list[Shard] = []
        self._keys: NDArray[np.bytes_] = np.empty(0, f"S{_KEY_BYTES}")
        # Shard, group, row and form of each; then an offset and a sum for each of its tensors.
        self._places: NDArray[np.int32] = np.empty((0, 4), np.int32)
        self._bytes: NDArray[np.int64] = np.empty((0, 0, 2), np.int64)
        self._forms: dict[str, int] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> None:
        """Take in the segments that were put since the last look."""
        with self._lock:
            keys, places, spots = [self._keys], [self._places], [self._bytes]
            for number, data in read_numbered(self._storage, self._folder, after=self._last):
                # Not read_table: it reads the schema of a whole data set first.
                table = pq.ParquetFile(pa.BufferReader(data)).read()
                metadata = table.schema.metadata
                self._shards.append(
                    Shard(metadata[b"shard"].decode(), int(metadata[b"size_bytes"]))
                )
                keys.append(_key_array(table["key"].to_pylist()))
                places.append(self._place_array(table))
                spots.append(_byte_array(table))
                self._last = number
            # np.unique names the first of equal keys: the one of the lowest segment.
            found, first = np.unique(np.concatenate(keys), return_index=True)
            self._keys, self._places = found, np.concatenate(places)[first]
            self._bytes = _stacked(spots)[first]

    def _place_array(self, table: pa.Table) -> NDArray[np.int32]:
        coded = one_chunk(pc.dictionary_encode(table["form"]))
        ids = [
            self._forms.setdefault(form, len(self._forms)) for form in coded.dictionary.to_pylist()
        ]
        group, row = as_numpy(table["group"]), as_numpy(table["row"])
        form = np.array(ids, np.int32)[as_numpy(coded.indices)] if ids else np.empty(0, np.int32)
        shard = np.full_like(group, len(self._shards) - 1)
        return np.stack([shard, group, row, form], axis=1)

    def contains(self, keys: Sequence[bytes] | NDArray[np.bytes_]) -> NDArray[np.bool_]:
        """Which of the keys are cached."""
        return self._positions(keys)[1]

    def find(self, keys: Sequence[bytes]) -> list[Place | None]:
        """Where each entry lies; None for those that are not cached."""
        with self._lock:
            positions, known = self._positions(keys)
            places = self._places[positions[known]].tolist()
            spots = self._bytes[positions[known]]
            offsets, crcs = spots[:, :, 0].tolist(), spots[:, :, 1].tolist()
            forms = list(self._forms)
        found = starmap(
            lambda place, at, crc: Place(
                self._shards[place[0]], place[1], place[2], forms[place[3]], tuple(at), tuple(crc)
            ),
            zip(places, offsets, crcs, strict=True),
        )
        return [next(found) if here else None for here in known]

    def groups(self, keys: NDArray[np.bytes_]) -> dict[tuple[Shard, int], None]:
        """The row groups in which entries lie, in the order of shards; absent ones are left out."""
        with self._lock:
            positions, known = self._positions(keys)
            pairs = np.unique(self._places[positions[known], :2], axis=0).tolist()
            return {(self._shards[shard], group): None for shard, group in pairs}

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


def _byte_array(table: pa.Table) -> NDArray[np.int64]:
    """(N, T, 2): offset and sum of each of T tensors."""
    count = sum(name.startswith("offset.") for name in table.column_names)
    columns = [
        np.stack([as_numpy(table[f"{word}.{number}"]) for number in range(count)], axis=1)
        for word in ("offset", "crc")
        if count
    ]
    if not columns:
        return np.empty((len(table), 0, 2), np.int64)
    return np.stack(columns, axis=2)


def _stacked(spots: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """One after the other, as wide as the widest."""
    width = max(one.shape[1] for one in spots)
    return np.concatenate(
        [np.pad(one, [(0, 0), (0, width - one.shape[1]), (0, 0)]) for one in spots]
    )
