"""Putting encoded entries into the cache: a Parquet shard under its content's name, then its index.

A kill between the two leaves a shard that nobody refers to, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raylora.base.numbered import NumberedWriter
from raylora.base.storage import Storage
from raylora.data.cache.index import INDEX_SUFFIX, Spot, Spots, index_folder, index_segment

# A reader fetches whole row groups: 4 to 8 MB are quick to fetch and few to keep open.
ROW_GROUP_BYTES = 6 * 2**20
SHARD_BYTES = 64 * 2**20


class ShardWriter:
    """Collects entries of one shape and leaves them in the cache as shards.

    A shard is put when `SHARD_BYTES` are collected, when `flush_seconds` have passed since its
    first entry (so a killed worker loses no more than that), and at `flush`.

    Args:
        recipe_folder: `latents-…` or `text-…`, below the cache.
        stem: beginning of the shards' names, for people: the bucket, or "text".
        row_group_bytes: about how much a reader has to fetch for one entry.
    """

    def __init__(
        self,
        cache: Storage,
        recipe_folder: str,
        stem: str,
        *,
        row_group_bytes: int = ROW_GROUP_BYTES,
        flush_seconds: float = 60.0,
    ) -> None:
        self._cache, self._folder, self._stem = cache, recipe_folder, stem
        self._row_group_bytes, self._flush_seconds = row_group_bytes, flush_seconds
        self._index = NumberedWriter(cache, index_folder(recipe_folder), INDEX_SUFFIX)
        self._rows: list[tuple[bytes, dict[str, NDArray[Any]], str]] = []
        self._bytes = 0
        self._since = 0.0
        self.written_bytes = 0

    def add(
        self, key: bytes, tensors: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]
    ) -> None:
        """Take one entry.

        Args:
            key: its 16 bytes.
            tensors: each name must come in every entry, in any shape and one dtype.
            facts: what the entry was made of, kept beside it for people.
        """
        if not self._rows:
            self._since = time.monotonic()
        copies = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
        self._rows.append((key, copies, json.dumps(facts, ensure_ascii=False)))
        self._bytes += sum(copy.nbytes for copy in copies.values())
        waited = time.monotonic() - self._since
        if self._bytes >= SHARD_BYTES or waited >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Put what was collected: the shard, then its index segment."""
        if not self._rows:
            return
        group_rows = max(1, self._row_group_bytes * len(self._rows) // max(1, self._bytes))
        data = _parquet(self._table(), group_rows)
        name = hashlib.blake2b(data, digest_size=16).hexdigest()
        shard = f"{self._folder}/shards/{self._stem}-{name}.parquet"
        self._cache.write(shard, data)
        keys = [key for key, _, _ in self._rows]
        spots = _spots(data, [tensors for _, tensors, _ in self._rows])
        self._index.put(index_segment(shard, len(data), keys, spots, group_rows))
        self.written_bytes += len(data)
        self._rows, self._bytes = [], 0

    def _table(self) -> pa.Table:
        columns: dict[str, pa.Array] = {
            "key": pa.array([key for key, _, _ in self._rows], pa.binary(16)),
            "facts": pa.array([facts for _, _, facts in self._rows], pa.string()),
        }
        for name in self._rows[0][1]:
            tensors = [row[1][name] for row in self._rows]
            shapes = [tensor.shape for tensor in tensors]
            columns[name] = pa.array([tensor.tobytes() for tensor in tensors], pa.large_binary())
            columns[f"{name}.shape"] = pa.array(shapes, pa.list_(pa.int32()))
            columns[f"{name}.dtype"] = pa.array([tensor.dtype.name for tensor in tensors])
        return pa.table(columns)


def _parquet(table: pa.Table, group_rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=group_rows,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return bytes(sink.getvalue())


def _spots(data: bytes, rows: Sequence[Mapping[str, NDArray[Any]]]) -> list[Spots]:
    """Where each tensor's bytes lie in the file.

    Found by looking for them, each after the one before: values are written as they are, in order.
    What is found too early is equal, and so as good.
    """
    spots: list[Spots] = [{} for _ in rows]
    for name in rows[0]:
        at = 0
        for row, found in zip(rows, spots, strict=True):
            content = row[name].tobytes()
            at = data.index(content, at)
            shape = tuple(row[name].shape)
            found[name] = Spot(row[name].dtype.name, shape, at, zlib.crc32(content))
            at += len(content)
    return spots
