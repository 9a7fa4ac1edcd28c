"""Arrow columns as numpy arrays, without a copy and without pandas in between."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Column: TypeAlias = Any
"""A pyarrow Array or ChunkedArray."""


def as_numpy(column: Column) -> NDArray[Any]:
    """The numbers of a column without nulls, not copied where it is one chunk."""
    return np.from_dlpack(one_chunk(column))


def is_set(column: Column) -> NDArray[np.bool_]:
    """Which values of a column are not null."""
    array = one_chunk(column)
    bitmap = array.buffers()[0]
    if bitmap is None or not array.null_count:  # a column of pa.null() has no bitmap either
        return np.full(len(array), not array.null_count)
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
    return bits[array.offset :][: len(array)].astype(np.bool_)


def one_chunk(column: Column) -> pa.Array:
    """The column as one array."""
    if isinstance(column, pa.ChunkedArray):
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return column
