"""Rows as columns: what goes in comes out, whichever way they are taken, joined or sent."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.base.seeds import sample_number
from raylora.data.rows import Row, Rows, joined, rows_of

SIDES = st.integers(8, 2**30)
SIZES = st.tuples(SIDES, SIDES)
NUMBERS = st.integers(0, 2**15 - 1)
# Many of them end in zeros, which numpy's own byte strings would lose.
NAMES = st.binary(min_size=16, max_size=16) | st.binary(max_size=16).map(
    lambda b: b.ljust(16, b"\0")
)


@st.composite
def rows(draw: st.DrawFn, *, most: int = 8) -> list[Row]:
    pictures, texts, of_set = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(NUMBERS))
    keys = draw(st.lists(st.text(max_size=6), max_size=most, unique=True))
    return [
        Row(
            key=key,
            repeats=draw(st.integers(1, 2**31 - 1)),
            bucket=draw(SIZES),
            caption=draw(st.text(max_size=6)),
            original_size=draw(SIZES),
            latents_keys=tuple(draw(NAMES) for _ in range(pictures)),
            text_keys=tuple(draw(NAMES) for _ in range(texts)),
            crops=tuple(draw(SIZES) for _ in range(pictures)),
            mask=draw(st.none() | st.text(max_size=6)),
            set=of_set,
            number=sample_number(key, 0, of_set),
        )
        for key in keys
    ]


def example(count: int = 4, *, pictures: int = 2, texts: int = 3, of_set: int = 0) -> Rows:
    return rows_of(
        [
            Row(
                key=f"folder/{number}.png",
                repeats=1 + number,
                bucket=(64 + 8 * number, 64),
                caption=f"caption {number}",
                original_size=(100, 200 + number),
                latents_keys=tuple(bytes([1, number, v]).ljust(16, b"\0") for v in range(pictures)),
                text_keys=tuple(bytes([2, number, v]).ljust(16, b"\0") for v in range(texts)),
                crops=tuple((number, v) for v in range(pictures)),
                mask=f"{number}.png" if number % 2 else None,
                set=of_set,
                number=sample_number(f"folder/{number}.png", 0, of_set),
            )
            for number in range(count)
        ]
    )


@given(rows())
def test_what_goes_in_comes_out(given_rows: list[Row]):
    held = rows_of(given_rows)
    assert list(held) == given_rows
    assert len(held) == len(given_rows)
    assert [held[index - len(held)] for index in range(len(held))] == given_rows
    assert list(pickle.loads(pickle.dumps(held))) == given_rows


@given(rows(), st.data())
def test_rows_are_taken_as_of_a_list(given_rows: list[Row], data: st.DataObject):
    held, count = rows_of(given_rows), len(given_rows)
    mask = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    wanted = [row for row, keep in zip(given_rows, mask, strict=True) if keep]
    assert list(held.take(np.array(mask, np.bool_))) == wanted
    indices = data.draw(st.lists(st.integers(0, count - 1))) if count else []
    assert list(held.take(np.array(indices, np.int64))) == [given_rows[at] for at in indices]
    cut = data.draw(st.slices(count))
    assert list(held[cut]) == given_rows[cut]
    # What was taken can be taken from, joined and sent again.
    again = pickle.loads(pickle.dumps(held.take(np.array(indices, np.int64))))
    assert list(joined([again, again])) == 2 * [given_rows[at] for at in indices]


def test_an_index_beyond_the_end_is_refused():
    held = example(3)
    for index in (3, -4):
        with pytest.raises(IndexError):
            held[index]
    with pytest.raises(IndexError):
        rows_of([])[0]


def test_a_row_is_named_by_its_key_and_its_set():
    row = example(2, of_set=3)[1]
    assert row.number == sample_number("folder/1.png", 0, 3)
    assert row.number != example(2)[1].number
    assert (row.latents_key, row.text_key, row.crop) == (
        row.latents_keys[0],
        row.text_keys[0],
        row.crops[0],
    )


@given(st.lists(rows(most=4), min_size=1, max_size=4))
def test_joined_parts_follow_each_other_and_their_variants_go_round(parts: list[list[Row]]):
    held = joined([rows_of(part) for part in parts])
    flat = [row for part in parts for row in part]
    # A part without rows counts one variant of each.
    pictures = max((len(row.latents_keys) for row in flat), default=1)
    texts = max((len(row.text_keys) for row in flat), default=1)
    assert [row.key for row in held] == [row.key for row in flat]
    for row, one in zip(held, flat, strict=True):
        assert row == replace(
            one,
            latents_keys=around(one.latents_keys, pictures),
            crops=around(one.crops, pictures),
            text_keys=around(one.text_keys, texts),
        )


def around(values: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    return tuple(values[at % len(values)] for at in range(count))


def changed(name: str, value: Any) -> Rows:
    held = example()
    return replace(held, **{name: value(getattr(held, name))})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keys", lambda column: pa.array(["other", *column.to_pylist()[1:]])),
        (
            "captions",
            lambda column: pa.array(["other", *column.to_pylist()[1:]], pa.large_string()),
        ),
        ("set", lambda column: column + 1),
        ("repeats", lambda column: column + 1),
        ("bucket", lambda column: column[:, ::-1]),
        ("original_size", lambda column: column[:, ::-1]),
        ("latents_keys", lambda column: column[:, ::-1]),
        ("text_keys", lambda column: column[:, ::-1]),
        ("crops", lambda column: column + 1),
    ],
)
def test_the_fingerprint_moves_with_every_column_that_changes_what_is_trained(
    name: str, value: Any
):
    assert changed(name, value).fingerprint() != example().fingerprint()


def test_names_cannot_slide_from_one_row_to_the_next_unseen():
    one, two = rows_of([example()[0], example()[1]]), rows_of([example()[0], example()[1]])
    one = replace(one, keys=pa.array(["ab", "c"]))
    two = replace(two, keys=pa.array(["a", "bc"]))
    assert one.fingerprint() != two.fingerprint()


def test_where_a_mask_lies_is_not_trained_on():
    """Its bytes name the latents."""
    moved = replace(example(), masks=pa.array([None] * 4, pa.string()))
    assert moved.fingerprint() == example().fingerprint()


def test_the_fingerprint_is_of_the_rows_and_not_of_how_they_came_about():
    whole = example(6)
    ways = [
        rows_of(list(whole)),
        pickle.loads(pickle.dumps(whole)),
        joined([whole[:2], whole[2:]]),
        joined([whole.take(np.zeros(6, np.bool_)), whole]),
        rows_of([*example(2), *whole])[2:],
        whole.take(np.arange(6)),
        joined([whole[1:], whole]).take(np.arange(5, 11)),
    ]
    assert {one.fingerprint() for one in ways} == {whole.fingerprint()}
    assert len({whole[:0].fingerprint(), rows_of([]).fingerprint()}) == 1


@pytest.mark.parametrize(("count", "variants"), [(1_000_000, 1), (100_000, 8)])
def test_a_row_takes_some_tens_of_bytes_its_names_and_its_texts(count: int, variants: int):
    few = example(10, pictures=variants, texts=variants)
    held = few.take(np.arange(count) % 10)
    strings = len("folder/0.png") + len("caption 0") + len("0.png") / 2
    # Three offsets (4, 8, 4), a bit for the mask, set 2, repeats 4, bucket and size 8 each; for
    # each picture a name of 16 and a crop of 8, for each caption a name of 16: a million rows of
    # one variant are 78 MB and their strings.
    each = 38.2 + 40 * variants + strings
    assert held.nbytes / count == pytest.approx(each, rel=0.01)
    assert len(pickle.dumps(held)) / count == pytest.approx(each, rel=0.01)
    assert held[count - 1] == few[9]


def test_a_small_part_of_many_rows_does_not_hold_the_others():
    held = example(10).take(np.arange(100_000) % 10)
    part = held[50:60]
    assert part.nbytes < 10 * 300
    assert len(pickle.dumps(part)) < 10 * 300 + 3000


def test_showings_are_counted_by_bucket():
    held = example(3)
    held = replace(held, bucket=np.array([[64, 80], [80, 64], [64, 80]], np.int32))
    assert held.showings_by_bucket() == {(64, 80): 1 + 3, (80, 64): 2}
    assert rows_of([]).showings_by_bucket() == {}
