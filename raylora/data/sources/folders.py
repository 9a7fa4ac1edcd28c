"""kohya's folders: children named `N_concept`, else the images directly in the data folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylora.base.columns import as_numpy
from raylora.base.errors import DataError
from raylora.data.sources.file_columns import flags, numbers, positions, strings
from raylora.data.sources.notes import first_few, images_in_words

if TYPE_CHECKING:
    from raylora.data.options import SetOptions

Concepts = dict[str, tuple[int, str]]
"""Folder -> (showings an epoch, concept)."""

_CONCEPT_FOLDER = re.compile(r"(?P<repeats>[0-9]+)_(?P<concept>.+)")
_MOST_REPEATS = 2**31 - 1
# A wrong folder may have a million others in it.
_MOST_NOTES = 20


class ConceptFinder:
    """Finds the children named `N_concept` among the keys of a folder, seen one by one."""

    def __init__(self, url: str) -> None:
        self.concepts: Concepts = {}
        self._url = url
        self._last = "/"

    def see(self, key: str) -> None:
        """Look at one key; quick where it is in the folder of the one before."""
        if key.startswith(self._last) or "/" not in key:
            return
        folder = key.partition("/")[0]
        self._last = f"{folder}/"
        match = _CONCEPT_FOLDER.fullmatch(folder)
        if not match or not int(match["repeats"]):
            return
        if int(match["repeats"]) > _MOST_REPEATS:
            raise DataError(
                f"{self._url}/{folder}: {match['repeats']} showings an epoch are too many. A name "
                "N_concept begins with how often its images are shown; rename the folder."
            )
        self.concepts[folder] = (int(match["repeats"]), match["concept"])


def choose_by_folders(
    images: pa.Table, concepts: Concepts, words: SetOptions, url: str
) -> tuple[pa.Table, list[str]]:
    """The images that the folders' names and `recursive` choose.

    Args:
        images: `FileColumns.table` of all images.
        url: of the data folder, for messages.

    Returns:
        Those chosen, with the columns repeats and concept; and what was left out.

    Raises:
        DataError: none is chosen.
    """
    folders = strings(list(concepts))
    names = strings([concept for _, concept in concepts.values()])
    counts = np.array([*(count for count, _ in concepts.values()), words.repeats], np.int32)
    batches: list[pa.RecordBatch] = []
    unused: Counter[str] = Counter()
    with_images: set[int] = set()
    for batch in images.to_batches():
        depth = as_numpy(pc.count_substring(batch["key"], "/"))
        # -1 stands for no concept, and takes the last of `counts`.
        row = positions(pc.replace_substring_regex(batch["key"], "/.*", ""), folders)
        depth_used = 1 if concepts else 0
        used = (depth >= depth_used) if words.recursive else (depth == depth_used)
        used &= (row >= 0) == bool(concepts)
        if not used.all():
            unused.update(_by_folder(batch.filter(flags(~used))))
            batch, row = batch.filter(flags(used)), row[used]
        with_images.update(np.unique(row).tolist())
        repeats, concept = numbers(counts[row]), names.take(numbers(row, row >= 0))
        batches.append(batch.append_column("repeats", repeats).append_column("concept", concept))
    if not any(len(batch) for batch in batches):
        raise DataError(_nothing_below(url, unused))
    empty = sorted(folder for row, folder in enumerate(concepts) if row not in with_images)
    notes = [*_not_used(unused, concepts)]
    notes += [f"no image directly in {folder}." for folder in empty[:_MOST_NOTES]]
    return pa.Table.from_batches(batches), notes


def _by_folder(images: pa.RecordBatch) -> dict[str, int]:
    counted = pc.value_counts(pc.replace_substring_regex(images["key"], "/?[^/]*$", ""))
    return dict(zip(*(column.to_pylist() for column in counted.flatten()), strict=True))


def _not_used(unused: Counter[str], concepts: Concepts) -> Iterator[str]:
    folders = sorted(unused)
    for folder in folders[:_MOST_NOTES]:
        yield (
            f"{images_in_words(unused[folder])} in {folder or 'the data folder itself'} not used: "
            + (
                "it is not named N_concept, as others beside it are."
                if concepts
                and ("/" not in f"{folder}/" or folder.partition("/")[0] not in concepts)
                else "it is below the folder (recursive: true takes them)."
            )
        )
    rest = folders[_MOST_NOTES:]
    if rest:
        count = sum(unused[folder] for folder in rest)
        yield f"{images_in_words(count)} in {len(rest)} more folders not used, for such reasons."


def _nothing_below(url: str, unused: Counter[str]) -> str:
    return (
        f"{url}: no image directly here, but {unused.total()} below, in "
        f"{first_few(sorted(unused))}. Name these N_concept (N showings an epoch), or set "
        "recursive: true."
    )
