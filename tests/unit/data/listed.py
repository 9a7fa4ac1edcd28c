"""Folders of empty files, and what `list_set` finds in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from raylora.base.storage import Storage, open_storage
from raylora.data.options import DataOptions, Native, SetOptions, resolve
from raylora.data.sources.listing import Listing, list_set
from raylora.data.sources.source import open_source


def put(folder: Path, *keys: str, data: bytes = b"x") -> Path:
    """The folder, with these files in it."""
    for key in keys:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def set_words(folder: Path | str | None = None, **more: Any) -> SetOptions:
    """The words of one small set."""
    more = {word: str(value) if isinstance(value, Path) else value for word, value in more.items()}
    data = DataOptions(folder=None if folder is None else str(folder), **more)
    (words,) = resolve(data, Native(resolution=64, bucket_step=8))
    return words


def listing_of(folder: Path | str | None, cache: Storage | None = None, **more: Any) -> Listing:
    words = set_words(folder, **more)
    return list_set(open_source(words, cache or open_storage("/nowhere")), words)


def found(listing: Listing) -> dict[str, tuple[int, str | None, str | None]]:
    """Image -> (repeats, concept, caption file)."""
    images = listing.images
    captions = beside(listing.captions, images["caption_file"])
    columns = [images[name].to_pylist() for name in ("key", "repeats", "concept")]
    rows = zip(*columns, captions, strict=True)
    return {key: (repeats, concept, caption) for key, repeats, concept, caption in rows}


def beside(files: pa.Table, rows: pa.ChunkedArray) -> list[str | None]:
    """Names of the files that a column of rows points at."""
    keys = files["key"].to_pylist()
    return [None if row is None else keys[row] for row in rows.to_pylist()]
