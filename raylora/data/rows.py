"""The rows of a data set: one for each image, held as columns, so that a million fit anywhere."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raylora.base.seeds import sample_number
from raylora.data.pixels.bucket import Size

KEY_BYTES = 16
"""Length of the name of a cached entry."""


@dataclass(frozen=True, slots=True)
class Row:
    """What training knows of one image; its tensors are fetched by their keys."""

    key: str
    """The image's path relative to its set's folder."""
    repeats: int
    """Showings in an epoch."""
    bucket: Size
    """Width and height in pixels."""
    caption: str
    """As it was read; what is shown may be drawn from it."""
    original_size: Size
    latents_keys: tuple[bytes, ...]
    """Names of the cached pictures, one for each variant."""
    text_keys: tuple[bytes, ...]
    """Names of the cached captions, one for each variant."""
    crops: tuple[Size, ...]
    """Left and top of each variant's true crop, in the resized image as it is shown."""
    mask: str | None = None
    """The mask's path relative to the set's mask folder."""
    set: int = 0
    """Which of the job's sets it is of."""
    number: int = 0
    """Names its randomness (`base.seeds.sample_number`), apart from which showing it is."""

    @property
    def latents_key(self) -> bytes:
        """Of the first variant."""
        return self.latents_keys[0]

    @property
    def text_key(self) -> bytes:
        """Of the first variant."""
        return self.text_keys[0]

    @property
    def crop(self) -> Size:
        """Of the first variant."""
        return self.crops[0]


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Row]):
    """Rows as columns; a `Row` is made when it is asked for."""

    keys: pa.Array
    """Strings."""
    captions: pa.Array
    """Strings."""
    set: NDArray[np.int16]
    repeats: NDArray[np.int32]
    bucket: NDArray[np.int32]
    """(N, 2): width and height in pixels."""
    original_size: NDArray[np.int32]
    """(N, 2): width and height of the file's picture."""
    latents_keys: NDArray[np.uint8]
    """(N, P, 16): one for each variant of the picture."""
    text_keys: NDArray[np.uint8]
    """(N, T, 16): one for each variant of the caption."""
    crops: NDArray[np.int32]
    """(N, P, 2)."""
    masks: pa.Array
    """Strings: the mask's path relative to the mask folder; null without one."""

    def __len__(self) -> int:
        return len(self.repeats)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        key, of_set = self.keys[index].as_py(), int(self.set[index])
        width, height = self.bucket[index].tolist()
        wide, high = self.original_size[index].tolist()
        return Row(
            key=key,
            repeats=int(self.repeats[index]),
            bucket=(width, height),
            caption=self.captions[index].as_py(),
            original_size=(wide, high),
            latents_keys=_split(self.latents_keys[index]),
            text_keys=_split(self.text_keys[index]),
            crops=tuple((left, top) for left, top in self.crops[index].tolist()),
            mask=self.masks[index].as_py(),
            set=of_set,
            number=sample_number(key, 0, of_set),
        )

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def take(self, chosen: NDArray[Any]) -> Rows:
        """The rows of these indices, or where a mask of truth values is set, in order."""
        if chosen.dtype == np.bool_:
            if chosen.all():
                return self
            chosen = np.flatnonzero(chosen)
        indices = pa.array(chosen.astype(np.int64))
        columns = {one.name: getattr(self, one.name) for one in fields(self)}
        return Rows(
            **{
                name: column.take(indices) if isinstance(column, pa.Array) else column[chosen]
                for name, column in columns.items()
            }
        )

    @property
    def nbytes(self) -> int:
        """Bytes that all columns hold."""
        return sum(getattr(self, one.name).nbytes for one in fields(self))

    def showings_by_bucket(self) -> Counter[Size]:
        """How many showings an epoch has in each bucket."""
        found: Counter[Size] = Counter()
        sizes, where = np.unique(self.bucket, axis=0, return_inverse=True)
        counts = np.bincount(where.ravel(), weights=self.repeats, minlength=len(sizes))
        for (width, height), count in zip(sizes.tolist(), counts.tolist(), strict=True):
            found[width, height] = int(count)
        return found

    def fingerprint(self) -> str:
        """16 hex digits that name what is trained on: all columns but where masks lie, whose bytes
        name the latents."""
        digest = hashlib.blake2b(digest_size=8)
        for one in fields(self):
            column = getattr(self, one.name)
            if isinstance(column, np.ndarray):
                digest.update(np.ascontiguousarray(column).tobytes())
            elif one.name != "masks":
                for buffer in column.buffers()[1:]:
                    digest.update(buffer or b"")
        return digest.hexdigest()


def rows_of(rows: Sequence[Row]) -> Rows:
    """Columns of given rows, which all have as many variants."""
    return Rows(
        keys=pa.array([row.key for row in rows], pa.string()),
        captions=pa.array([row.caption for row in rows], pa.large_string()),
        set=np.array([row.set for row in rows], np.int16),
        repeats=np.array([row.repeats for row in rows], np.int32),
        bucket=np.array([row.bucket for row in rows], np.int32).reshape(-1, 2),
        original_size=np.array([row.original_size for row in rows], np.int32).reshape(-1, 2),
        latents_keys=key_columns([row.latents_keys for row in rows]),
        text_keys=key_columns([row.text_keys for row in rows]),
        crops=np.array([row.crops for row in rows], np.int32).reshape(
            len(rows), -1 if rows else 1, 2
        ),
        masks=pa.array([row.mask for row in rows], pa.string()),
    )


def joined(parts: Sequence[Rows]) -> Rows:
    """One after the other; where one has fewer variants than another, they go round."""
    pictures = max((part.latents_keys.shape[1] for part in parts), default=1)
    texts = max((part.text_keys.shape[1] for part in parts), default=1)
    wide = [_widened(part, pictures, texts) for part in parts]
    columns: dict[str, Any] = {}
    for one in fields(Rows):
        values = [getattr(part, one.name) for part in wide]
        arrow = isinstance(values[0], pa.Array)
        columns[one.name] = pa.concat_arrays(values) if arrow else np.concatenate(values)
    return Rows(**columns)


def key_columns(keys: Sequence[Sequence[bytes]]) -> NDArray[np.uint8]:
    """(N, V, 16) bytes of N times V names."""
    flat = b"".join(key for variants in keys for key in variants)
    return np.frombuffer(flat, np.uint8).reshape(len(keys), -1, KEY_BYTES) if keys else _NO_KEYS


def _widened(rows: Rows, pictures: int, texts: int) -> Rows:
    picture = np.arange(pictures) % rows.latents_keys.shape[1]
    text = np.arange(texts) % rows.text_keys.shape[1]
    return Rows(
        rows.keys,
        rows.captions,
        rows.set,
        rows.repeats,
        rows.bucket,
        rows.original_size,
        rows.latents_keys[:, picture],
        rows.text_keys[:, text],
        rows.crops[:, picture],
        rows.masks,
    )


def _split(keys: NDArray[np.uint8]) -> tuple[bytes, ...]:
    flat = keys.tobytes()
    return tuple(flat[at : at + KEY_BYTES] for at in range(0, len(flat), KEY_BYTES))


_NO_KEYS = np.empty((0, 1, KEY_BYTES), np.uint8)


@dataclass(frozen=True, slots=True)
class BadSample:
    """An image that is left out, and why."""

    key: str
    reason: str
    set: int = 0
    """Which of the job's sets it is of."""
