"""The images of a set with their captions and masks, by name: kohya's folders, tars, or a list.

Names are held as Arrow columns and matched there, so that a million images take some 100 bytes
each. No file is read but a manifest and the headers of tars.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raylora.base.columns import as_numpy, is_set
from raylora.base.errors import DataError
from raylora.base.storage import Storage, open_storage
from raylora.data.pixels import decode
from raylora.data.sources.beside import Rows, find_captions, find_masks, only_used
from raylora.data.sources.file_columns import FileColumns, Names, flags, image_stems, keep, numbers
from raylora.data.sources.folders import ConceptFinder, Concepts, choose_by_folders
from raylora.data.sources.manifest import read_manifest
from raylora.data.sources.notes import first_few, images_in_words
from raylora.data.sources.tars import TarFolder

if TYPE_CHECKING:
    from raylora.data.options import SetOptions

# Somebody may take these for images of the set, so they are named rather than passed over.
OTHER_IMAGE_SUFFIXES = frozenset({".gif", ".tif", ".tiff", ".jxl", ".heic", ".heif", ".psd"})


@dataclass(frozen=True)
class Listing:
    """The images of a set, and what a person should know about what was left out."""

    images: pa.Table
    """key (string, sorted by code point), size_bytes (int64), tag (string), repeats (int32),
    concept (string or null), caption (large_string; null unless a manifest gives it), caption_file
    (int32; row of `captions`, or null), mask_file (int32; row of `masks`, or null)."""
    captions: pa.Table
    """key, size_bytes, tag of the caption files that are used."""
    masks: pa.Table
    """key, size_bytes, tag of the masks that are used, in the mask folder."""
    notes: tuple[str, ...]
    """Sentences."""


def list_set(source: Storage, words: SetOptions) -> Listing:
    """Find the images of a set, and the captions and masks that belong to them.

    Args:
        source: as `open_source` gives it.

    Raises:
        DataError: no image is found where one is looked for, or a manifest or a tar is broken.
    """
    found = _scan(source, words)
    if not len(found.images):
        raise DataError(_nothing_found(source, words))
    if words.manifest is not None:
        images, notes = _choose_by_manifest(found.images, source.url, words)
    elif words.tars:
        images, notes = _as_written(found.images, words), []
    else:
        images, notes = choose_by_folders(found.images, found.concepts, words, source.url)
    if "caption" not in images.column_names:
        images = images.append_column("caption", pa.nulls(len(images), pa.large_string()))
    captions, caption_file, caption_notes = _captions_of(images, found.captions, words)
    masks, mask_file = _masks_of(images, words)
    images = images.append_column("caption_file", caption_file)
    images = images.append_column("mask_file", mask_file)
    notes += [*_other_notes(source, found.others), *caption_notes]
    return Listing(images, captions, masks, tuple(notes))


class _Found(NamedTuple):
    """What one look over a folder finds; tables as `FileColumns` makes them."""

    images: pa.Table
    captions: list[tuple[pa.Table, int]]
    """With the length of their ending; those that are preferred first: by extension, and among one
    extension those with its letters in the case as it is written."""
    concepts: Concepts
    others: Counter[str]
    """Images that are not used, by their ending."""


def _scan(source: Storage, words: SetOptions) -> _Found:
    suffixes = decode.image_suffixes()
    extensions = [(extension, extension.lower()) for extension in words.caption_extensions]
    endings = tuple(lower for _, lower in extensions)
    images, captions = FileColumns(), [FileColumns() for _ in range(2 * len(extensions))]
    by_folders = words.manifest is None and not words.tars
    concepts, others = ConceptFinder(source.url), Counter[str]()
    masks = _masks_inside(source, words)
    for entry in source.scan():
        key = entry.key
        if masks and key.startswith(masks):
            continue
        if by_folders:
            concepts.see(key)
        suffix = _suffix(key)
        if suffix in suffixes:
            images.add(entry)
        elif suffix in OTHER_IMAGE_SUFFIXES:
            others[suffix] += 1
        elif key.lower().endswith(endings):
            for number, (written, lower) in enumerate(extensions):
                if key.lower().endswith(lower):
                    rank = 2 * number + (not key.endswith(written))
                    captions[rank].add(entry)
    return _Found(
        images.table(),
        [(files.table(), len(endings[rank // 2])) for rank, files in enumerate(captions)],
        concepts.concepts,
        others,
    )


def _masks_inside(source: Storage, words: SetOptions) -> str:
    """The mask folder as a key, where it lies in the data folder: masks are no images to train."""
    if words.mask_folder is None:
        return ""
    url, root = f"{open_storage(words.mask_folder).url}/", f"{source.url}/"
    return url.removeprefix(root) if url.startswith(root) else ""


def _captions_of(
    images: pa.Table, files: list[tuple[pa.Table, int]], words: SetOptions
) -> tuple[pa.Table, pa.Array, list[str]]:
    """(caption files that are used, their rows for each image, notes)."""
    open_rows = ~is_set(images["caption"])
    rows = np.full(len(images), -1, np.int32)
    rows[open_rows], notes = find_captions(keep(images, open_rows), files, words.caption_extensions)
    tables = [table for table, _ in files] or [FileColumns().table()]
    return (*only_used(pa.concat_tables(tables), rows), notes)


def _masks_of(images: pa.Table, words: SetOptions) -> tuple[pa.Table, pa.Array]:
    """(masks that are used, their rows for each image)."""
    suffixes = decode.image_suffixes()
    files = FileColumns()
    none: Rows = np.full(len(images), -1, np.int32)
    if words.mask_folder is None:
        return only_used(files.table(), none)
    folder = open_storage(words.mask_folder)
    for entry in folder.scan():
        if _suffix(entry.key) in suffixes:
            files.add(entry)
    masks = files.table()
    if not len(masks):
        raise DataError(
            f"{folder.url}: no mask here (looked for {_listed(suffixes)}). Check mask_folder."
        )
    return only_used(masks, find_masks(images, masks))


def _choose_by_manifest(
    images: pa.Table, url: str, words: SetOptions
) -> tuple[pa.Table, list[str]]:
    """The images that a list names, with its captions and repeats."""
    named = read_manifest(url, words)
    if not len(named):
        raise DataError(f"{words.manifest}: it names no image. Check manifest.")
    named, notes = _last_of_each(named)
    names = named["name"]
    rows = Names(names).find_all(images["key"])
    hit = np.zeros(len(named), np.bool_)
    hit[rows[rows >= 0]] = True
    if not hit.all():
        notes += _match_stems(images, names, rows, hit)
    if not (rows >= 0).any():
        raise DataError(
            f"{words.manifest}: {url} has none of the {len(named)} images that it names "
            f"({first_few(names.slice(0, 4).to_pylist())}). Set folder to the one that their "
            "paths are relative to."
        )
    if not hit.all():
        missing = names.filter(flags(~hit))
        notes.append(
            f"{images_in_words(len(missing))} of {words.manifest} not used: not in {url}: "
            f"{first_few(missing.slice(0, 4).to_pylist())}."
        )
    chosen = keep(images, rows >= 0)
    rows = rows[rows >= 0]
    repeats = as_numpy(named["repeats"])[rows]
    chosen = _as_written(chosen, words, np.where(repeats > 0, repeats, np.int32(words.repeats)))
    caption = named["caption"].take(numbers(rows))
    return chosen.append_column("caption", caption), notes


def _last_of_each(named: pa.Table) -> tuple[pa.Table, list[str]]:
    names, rows = named["name"], np.arange(len(named))
    double = int((Names(names).find_all(names) != rows).sum())
    if not double:
        return named, []
    named = named.take(numbers(rows[::-1]))
    names = named["name"]
    named = keep(named, Names(names).find_all(names) == rows)
    return named, [f"{images_in_words(double)} listed again; the last row of each counts."]


def _match_stems(
    images: pa.Table, names: pa.ChunkedArray, rows: Rows, hit: NDArray[np.bool_]
) -> list[str]:
    """sd-scripts' lists may lack endings: give such a name the first image of that stem.

    Fills in `rows`, the images' rows of the list, and `hit`, which rows have an image.
    """
    found = Names(names).find_all(image_stems(images["key"]))
    free = np.flatnonzero((rows < 0) & (found >= 0))
    free = free[~hit[found[free]]]
    _, firsts = np.unique(found[free], return_index=True)
    rows[free[firsts]] = found[free[firsts]]
    hit[found[found >= 0]] = True
    left = len(free) - len(firsts)
    if not left:
        return []
    return [
        f"{images_in_words(left)} not used: the list names another one that differs only in its "
        "ending."
    ]


def _as_written(images: pa.Table, words: SetOptions, repeats: Rows | None = None) -> pa.Table:
    """The images with their columns repeats and concept, whatever folder they are in."""
    if repeats is None:
        repeats = np.full(len(images), words.repeats, np.int32)
    images = images.append_column("repeats", numbers(repeats))
    return images.append_column("concept", pa.nulls(len(images), pa.string()))


def _other_notes(source: Storage, others: Counter[str]) -> Iterator[str]:
    for suffix, count in sorted(others.items()):
        yield f"{images_in_words(count)} ending in {suffix} not used: convert to PNG, JPEG or WebP."
    if isinstance(source, TarFolder):
        yield from source.notes


def _nothing_found(source: Storage, words: SetOptions) -> str:
    endings = _listed(decode.image_suffixes())
    if not words.tars:
        return f"{source.url}: no image here (looked for {endings}). Check folder."
    notes = source.notes if isinstance(source, TarFolder) else ()
    looked = f"{source.url}: no image in a *.tar here (looked for {endings})."
    return " ".join([looked, *(notes or ["Check folder."])])


def _suffix(key: str) -> str:
    return key[key.rfind(".") :].lower()


def _listed(suffixes: frozenset[str]) -> str:
    return " ".join(sorted(suffixes))
