"""Arrow columns as numpy arrays: whole, cut, in pieces, empty."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.base.columns import as_numpy, is_set, one_chunk


def in_pieces(array: pa.Array, cut: int) -> pa.ChunkedArray:
    return pa.chunked_array([array[:cut], array[cut:]], type=array.type)


def test_one_chunk_of_numbers_is_not_copied():
    array = pa.array([1, 2, 3, 4], pa.int64())
    address = array.buffers()[1].address
    assert as_numpy(array).ctypes.data == address
    assert as_numpy(pa.chunked_array([array])).ctypes.data == address
    assert as_numpy(array[1:]).ctypes.data == address + 8


@given(st.lists(st.integers(-(2**31), 2**31 - 1)), st.integers(0, 9), st.integers(0, 9))
def test_numbers_are_those_of_the_column_however_it_is_cut(values: list[int], start: int, cut: int):
    array = pa.array(values, pa.int32())[start:]
    assert as_numpy(array).tolist() == values[start:]
    assert as_numpy(in_pieces(array, cut)).tolist() == values[start:]
    assert as_numpy(array).dtype == np.int32


def test_a_column_of_no_chunks_is_empty():
    assert as_numpy(pa.chunked_array([], pa.int32())).tolist() == []
    assert is_set(pa.chunked_array([], pa.string())).tolist() == []


@pytest.mark.filterwarnings("ignore:Exporting an unversioned DLPack")
def test_numbers_with_nulls_are_refused():
    with pytest.raises(pa.ArrowException, match="null"):
        as_numpy(pa.array([1, None]))


@given(st.lists(st.none() | st.text(max_size=3)), st.integers(0, 20), st.integers(0, 20))
def test_what_is_set_is_what_is_not_null(values: list[str | None], start: int, cut: int):
    expected = [value is not None for value in values[start:]]
    array = pa.array(values, pa.string())[start:]
    assert is_set(array).tolist() == expected
    assert is_set(in_pieces(array, cut)).tolist() == expected
    assert is_set(array).dtype == np.bool_


def test_a_column_of_nulls_alone_has_nothing_set():
    assert is_set(pa.nulls(3)).tolist() == [False] * 3
    assert is_set(pa.nulls(3, pa.large_string())).tolist() == [False] * 3


def test_what_is_one_chunk_already_is_handed_on():
    array = pa.array(["a", "b"])
    assert one_chunk(array) is array
    assert one_chunk(pa.chunked_array([array])).buffers()[2].address == array.buffers()[2].address
    assert one_chunk(in_pieces(array, 1)).to_pylist() == ["a", "b"]
