"""Captions and masks of images, found by their names among a million others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raylora.data.sources.file_columns import Names, flags, image_stems, keep, numbers, truths
from raylora.data.sources.notes import first_few, images_in_words

Rows = NDArray[np.int32]
"""A row of another table for each image; -1 for none."""

# kohya finds `name.txt` for `name_x_y_w_h.png`, an image with the place of a face.
_FACE = r"^(.*)(_[^_/]*){4}$"


def find_captions(
    images: pa.Table, files: Sequence[tuple[pa.Table, int]], extensions: Sequence[str]
) -> tuple[Rows, list[str]]:
    """The caption file of each image: a row of the files' tables, one after the other.

    Args:
        images: with the column key.
        files: caption files and the length of their ending, those that are preferred first.
        extensions: in which order they are preferred, for notes.
    """
    names = _Captions(files)
    rows = np.full(len(images), -1, np.int32)
    several = np.zeros(len(images), np.bool_)
    direct = np.zeros(len(images), np.bool_)
    start = 0
    for keys in images["key"].chunks:
        here = slice(start, start + len(keys))
        stems = image_stems(keys)
        rows[here], several[here] = names.find(stems)
        direct[here] = rows[here] >= 0
        alone = np.flatnonzero(~direct[here])
        stems = stems.take(numbers(alone))
        is_face = pc.match_substring_regex(stems, _FACE)
        faces = pc.replace_substring_regex(stems.filter(is_face), _FACE, r"\1")
        alone = start + alone[truths(is_face)]
        rows[alone], several[alone] = names.find(faces)
        start += len(keys)
    notes = [*_shared(rows[direct], files)]
    if several.any():
        double = images["key"].filter(flags(several))
        notes.append(
            f"{images_in_words(len(double))} with two caption files; the first of "
            f"{', '.join(extensions)} is used: {first_few(double.slice(0, 4).to_pylist())}."
        )
    return rows, notes


def find_masks(images: pa.Table, masks: pa.Table) -> Rows:
    """The mask of each image: of the same path without the ending, else directly in the folder."""
    names = Names(masks["key"], image_stems)
    rows: list[Rows] = []
    for keys in images["key"].chunks:
        stems = image_stems(keys)
        found = names.find(stems)
        alone = np.flatnonzero(found < 0)
        # Masks in folders are found by no such name: theirs have slashes.
        inside = pc.replace_substring_regex(stems.take(numbers(alone)), "^.*/", "")
        found[alone] = names.find(inside)
        rows.append(found)
    return np.concatenate(rows)


def only_used(files: pa.Table, rows: Rows) -> tuple[pa.Table, pa.Array]:
    """The files that some image has, and the images' column that points at them."""
    used = np.zeros(len(files), np.bool_)
    used[rows[rows >= 0]] = True
    moved = np.cumsum(used, dtype=np.int32) - 1
    new = np.where(rows >= 0, moved[rows], np.int32(-1)) if len(files) else rows
    return keep(files, used), numbers(new, rows >= 0)


class _Captions:
    """Tables of caption files, those that are preferred first."""

    def __init__(self, files: Sequence[tuple[pa.Table, int]]) -> None:
        self._tables: list[tuple[int, Names]] = []
        start = 0
        for table, ending in files:
            if len(table):
                cut = partial(pc.utf8_slice_codeunits, start=0, stop=-ending)
                self._tables.append((start, Names(table["key"], cut)))
            start += len(table)

    def find(self, stems: pa.Array) -> tuple[Rows, NDArray[np.bool_]]:
        """(row of the first file of each stem, whether there is more than one)."""
        rows = np.full(len(stems), -1, np.int32)
        several = np.zeros(len(stems), np.bool_)
        for start, names in self._tables:
            found = names.find(stems)
            several |= (rows >= 0) & (found >= 0)
            rows = np.where((rows < 0) & (found >= 0), found + np.int32(start), rows)
        return rows, several


def _shared(rows: Rows, files: Sequence[tuple[pa.Table, int]]) -> Iterator[str]:
    """Images that differ only in their ending have one caption file, maybe by mistake."""
    counts = np.bincount(rows)
    shared = np.flatnonzero(counts > 1)
    if len(shared):
        keys = (
            pa.concat_tables([table for table, _ in files])["key"]
            .take(numbers(shared[:4]))
            .to_pylist()
        )
        yield (
            f"{images_in_words(int(counts[shared].sum()))} differ only in their ending and share "
            f"a caption file: {first_few(keys)}."
        )
