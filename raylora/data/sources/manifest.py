"""A list of images with their captions: JSON lines, Parquet, or sd-scripts' metadata JSON.

JSON lines and Parquet are read a piece at a time. A metadata JSON is one object, held as text while
it is read.
"""

from __future__ import annotations

import io
import json
import math
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylora.base.errors import DataError
from raylora.base.storage import Entry, Storage, open_storage
from raylora.data.sources.file_columns import numbers, strings, texts
from raylora.data.sources.range_file import RangeFile

if TYPE_CHECKING:
    from raylora.data.options import SetOptions

IMAGE_WORDS = ("image_path", "image", "file_name", "path", "key")
TEXT_WORDS = ("caption", "text")
_ROWS = 2**15
_PARQUET_ROWS = 2**12
_MOST_REPEATS = 2**31 - 1
_NAMES = ["name", "caption", "repeats"]

_Row = dict[str, Any]
_Kept = tuple[str, bytes | None, int]
"""Name, caption, repeats."""


def manifest_place(url: str) -> tuple[Storage, str]:
    """(the folder that a list lies in, its name there)."""
    folder, slash, name = url.rpartition("/")
    return open_storage(folder + slash or "."), name


def read_manifest(source_url: str, words: SetOptions) -> pa.Table:
    """The images that a list names, in its order.

    Args:
        source_url: of the storage that the images are in; names become relative to it.

    Returns:
        name (string; may lack its ending), caption (large_string, tags appended; null where none is
        given), repeats (int32; 0 where none is given).

    Raises:
        DataError: the list is not there or of another kind, or a row is broken, with its number.
    """
    url = words.manifest or ""
    storage, name = manifest_place(url)
    entry = storage.entry(name)
    if entry is None:
        raise DataError(f"{url}: there is no such file. Check manifest.")
    rows_of = _READERS.get(posixpath.splitext(name)[1].lower())
    if rows_of is None:
        raise DataError(f"{url}: a manifest ends in {', '.join(_READERS)}. Rename or convert it.")
    root = _Root(source_url.rstrip("/"))
    chunks: list[pa.RecordBatch] = []
    kept: list[_Kept] = []
    for place, row in rows_of(storage, entry, url):
        kept.append(_checked(row, place, root, words))
        if len(kept) == _ROWS:
            chunks.append(_batch(kept))
            kept.clear()
    chunks.append(_batch(kept))
    return pa.Table.from_batches(chunks)


def _batch(rows: Sequence[_Kept]) -> pa.RecordBatch:
    columns = [
        strings([row[0] for row in rows]),
        texts([row[1] for row in rows]),
        numbers(np.array([row[2] for row in rows], np.int32)),
    ]
    return pa.RecordBatch.from_arrays(columns, _NAMES)


def _checked(row: _Row, place: str, root: _Root, words: SetOptions) -> _Kept:
    try:
        name = root.relative(_name(row, place), place)
        name.encode()  # refused here, where the row is known
        caption = _caption(row, place, words)
        return name, None if caption is None else caption.encode(), _repeats(row, place)
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: a name or caption is not clean Unicode ({error}).") from error


# -- one row


class _Root(NamedTuple):
    """Where the images are."""

    url: str

    def relative(self, name: str, place: str) -> str:
        """The name of an image as a key of its folder, whether it is a path, a URL or relative."""
        if "\\" in name and "/" not in name:  # written on Windows
            name = name.replace("\\", "/")
        # Nearly all names are clean; a million need not be taken apart.
        if "./" not in name and "//" not in name and not name.startswith("/"):
            return name
        scheme, separator, path = name.partition("://")
        if separator or name.startswith("/"):
            path = posixpath.normpath(path if separator else name)
            here = self.url.partition("://")
            inside = f"{here[2].rstrip('/')}/"
            if (scheme if separator else "file") == here[0] and path.startswith(inside):
                return path[len(inside) :]
        else:
            path = posixpath.normpath(name)
            if not path.startswith("../"):
                return path
        raise DataError(
            f"{place}: {name} is not in {self.url}. Set folder to one that all images of the list "
            "are in, or below."
        )


def _name(row: _Row, place: str) -> str:
    for word in IMAGE_WORDS:
        value = row.get(word)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, dict):
            raise DataError(f"{place}: {word} {_NESTED}")
        if value is not None:
            raise DataError(f"{place}: {word} is {_shown(value)}, not the path of an image.")
    raise DataError(f"{place}: it names no image. Write one of {', '.join(IMAGE_WORDS)}.")


def _caption(row: _Row, place: str, words: SetOptions) -> str | None:
    """The text with the tags behind it, behind each of its lines with wildcards."""
    text = next((row[word] for word in TEXT_WORDS if row.get(word) is not None), None)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{place}: the caption is {_shown(text)}, not text.")
    tags = _tags(row.get("tags"), place, words.caption_separator)
    if not text:
        return tags if tags is not None else text
    if not tags:
        return text
    if not words.enable_wildcard:
        return f"{text}{words.caption_separator}{tags}"
    tags = words.caption_separator.join(tags.splitlines())
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(f"{line}{words.caption_separator}{tags}" for line in lines)


def _tags(value: object, place: str, separator: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        return (separator if separator[-1].isspace() else f"{separator} ").join(value)
    raise DataError(f"{place}: tags is {_shown(value)}, not text or a list of texts.")


def _repeats(row: _Row, place: str) -> int:
    value = row.get("repeats")
    # Parquet written by pandas has 2.0 for 2 and NaN for nothing where a value is missing.
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        value = None if math.isnan(value) else int(value)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_REPEATS:
        raise DataError(f"{place}: repeats is {_shown(value)}, not a whole number from 1.")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


_NESTED = (
    "holds the picture itself, not its path. Write the pictures to a folder or to WebDataset tars "
    "(tars: true), and their paths into the list."
)


# -- one kind of file


def _json_lines(storage: Storage, entry: Entry, url: str) -> Iterator[tuple[str, _Row]]:
    with io.BufferedReader(RangeFile(storage, entry), 2**20) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{url}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                shown = line[:40].decode(errors="replace").strip()
                raise DataError(f"{place}: no JSON ({error}): {shown}. Mend the line.") from error
            if not isinstance(row, dict):
                raise DataError(f"{place}: {_shown(row)} is no JSON object. Mend the line.")
            yield place, row


def _metadata(storage: Storage, entry: Entry, url: str) -> Iterator[tuple[str, _Row]]:
    """sd-scripts' `{path: {caption, tags, ...}}`, an entry at a time."""
    try:
        text = storage.read(entry.key).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    counted, line = 0, 1
    for at, key, value in _pairs(text, url):
        line, counted = line + text.count("\n", counted, at), at
        place = f"{url}, line {line}"
        if not isinstance(value, dict):
            raise DataError(
                f"{place}: {key} has {_shown(value)}, where an object with caption or tags belongs."
            )
        yield place, {**value, IMAGE_WORDS[0]: key}


def _pairs(text: str, url: str) -> Iterator[tuple[int, str, Any]]:
    """(place in the text, key, value) of one JSON object; never all of them at a time."""
    decode = json.JSONDecoder().raw_decode
    blank = re.compile(r"[ \t\r\n]*")

    def skip(at: int, mark: str = "") -> int:
        at = blank.match(text, at).end()  # type: ignore[union-attr]
        if not mark:
            return at
        if text[at : at + 1] not in mark or at == len(text):
            found = _shown(text[at : at + 20]) if at < len(text) else "the end"
            wanted = " or ".join(repr(one) for one in mark)
            raise json.JSONDecodeError(f"{found} where {wanted} belongs", text, at)
        return at + 1

    try:
        at = skip(skip(0, "{"))
        more = text[at : at + 1] != "}"
        while more:
            start = skip(skip(at, '"') - 1)
            key, at = decode(text, start)
            value, at = decode(text, skip(skip(at, ":")))
            yield start, key, value
            at = skip(at, ",}")
            more = text[at - 1] == ","
            at = skip(at)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{url}, line {error.lineno}: {error.msg}. A .json manifest is sd-scripts' metadata, "
            '{"path": {"caption": "..."}, ...}; one object a line is .jsonl.'
        ) from error


def _parquet(storage: Storage, entry: Entry, url: str) -> Iterator[tuple[str, _Row]]:
    try:
        file = pq.ParquetFile(RangeFile(storage, entry))
        columns = _columns(file.schema_arrow, url)
        number = 0
        # More threads would seek in one file at a time.
        for batch in file.iter_batches(_PARQUET_ROWS, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield f"{url}, row {number}", row
    except pa.ArrowException as error:
        raise DataError(f"{url}: cannot be read as Parquet ({error}). Make it anew.") from error


def _columns(schema: pa.Schema, url: str) -> list[str]:
    images = [word for word in IMAGE_WORDS if word in schema.names]
    plain = [word for word in images if not pa.types.is_nested(schema.field(word).type)]
    if images and not plain:
        raise DataError(f"{url}: column {images[0]} {_NESTED}")
    if not images:
        raise DataError(
            f"{url}: no column names the images (it has {', '.join(schema.names)}). Name one of "
            f"them {', '.join(IMAGE_WORDS)}."
        )
    others = [word for word in (*TEXT_WORDS, "tags", "repeats") if word in schema.names]
    return [*plain, *others]


_READERS: dict[str, Callable[[Storage, Entry, str], Iterator[tuple[str, _Row]]]] = {
    ".jsonl": _json_lines,
    ".json": _metadata,
    ".parquet": _parquet,
}
