"""Learning what a set holds, with as few reads as can be: its rows, and what is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raylora.base.columns import is_set
from raylora.base.errors import DataError, MissingObject
from raylora.base.seeds import sample_number
from raylora.base.storage import Entry, Storage, open_storage
from raylora.data.cache.recipe import ALPHA, LatentsNamer, text_key
from raylora.data.captions import caption_lines, caption_of, draw_caption, read_caption
from raylora.data.options import DataOptions, SetOptions
from raylora.data.pixels.augment import Look, true_crop
from raylora.data.pixels.bucket import Size
from raylora.data.pixels.decode import decode_mask, decoder_name, read_size
from raylora.data.pixels.masks import check_shape
from raylora.data.pixels.pictures import decode_problem, without_name
from raylora.data.prefetch import map_ahead
from raylora.data.rows import BadSample, Rows, joined, key_columns
from raylora.data.sources.listing import Listing, list_set
from raylora.data.sources.remembered import Seen, SourceMemory, sources_folder
from raylora.data.sources.source import open_source
from raylora.data.variants import PLAIN, Variants, draw_picture, draw_text, variants_of

_FETCH_THREADS = 16
# Rows that are Python objects at one time.
_CHUNK = 2**15


class Memories:
    """What is remembered of each folder, loaded once however many sets look into it."""

    def __init__(self, cache: Storage, judges: tuple[str, ...]) -> None:
        self._cache, self._judges = cache, judges
        self._loaded: dict[str, SourceMemory] = {}

    def of(self, folder: str) -> SourceMemory:
        """The memory in a cache folder."""
        if folder not in self._loaded:
            self._loaded[folder] = SourceMemory(self._cache, folder, self._judges)
            self._loaded[folder].load()
        return self._loaded[folder]


@dataclass(frozen=True)
class Examined:
    """A set, examined.

    Attributes:
        training, held_out: its good rows; an image may still turn out bad when decoded whole.
        bad: images that are left out.
        uncaptioned: images that lack a caption.
        images: how many were listed.
        folder: URL of its images.
        memory_folder: cache folder of what is remembered of them.
    """

    training: Rows
    held_out: Rows
    bad: list[BadSample]
    uncaptioned: list[str]
    images: int
    notes: tuple[str, ...]
    folder: str
    memory_folder: str


def examine_set(
    number: int,
    options: SetOptions,
    data: DataOptions,
    cache: Storage,
    memories: Memories,
    *,
    trust: bool,
) -> Examined:
    """List a set, fetch the files that are new or changed, and make its rows.

    Args:
        number: its place among the job's sets.
        trust: take what is remembered of a file that has its size and tag still.
    """
    source = open_source(options, cache)
    listing = list_set(source, options)
    whole = data.pictures_live
    # With `cache: none` nothing else decodes an image before it is trained on.
    folder = sources_folder(f"{source.url} decoded" if whole else source.url)
    memory = memories.of(folder)
    images = _look_at(source, listing.images, memory, trust=trust, look=_image_look(whole))
    captions = _look_at(source, listing.captions, memory, trust=trust, look=_look_at_caption)
    masks = None
    if options.mask_folder:
        store = open_storage(options.mask_folder)
        # Read whole here, since later a broken mask would be taken for a broken image.
        known = memories.of(sources_folder(f"{store.url} decoded"))
        masks = _look_at(store, listing.masks, known, trust=trust, look=_look_at_mask)
    maker = _RowMaker(number, options, data, listing, images, captions, masks)
    maker.make()
    return Examined(
        training=maker.rows(maker.training, variants_of(options, data)),
        held_out=maker.rows(maker.held_out, Variants(1, 1, data.variant_seed)),
        bad=maker.bad,
        uncaptioned=maker.uncaptioned,
        images=len(listing.images),
        notes=listing.notes,
        folder=source.url,
        memory_folder=folder,
    )


Look_ = Callable[[bytes, str], dict[str, Any]]
"""(content, key) -> the facts of a `Seen`; DataError says why the file cannot be used."""


def _look_at(
    source: Storage, entries: pa.Table, memory: SourceMemory, *, trust: bool, look: Look_
) -> pa.Table:
    """What every file holds (`SourceMemory.find`), fetching those that are new or changed.

    Nulls stand for a file that was deleted while the folder was read.
    """
    found = memory.find(entries)
    fresh = entries
    if trust:
        fresh = entries.filter(pa.array(~is_set(found["sha256"])))
    if not len(fresh):
        return found
    try:
        listed = (Entry(**row) for row in _python(fresh))
        for seen in map_ahead(
            lambda entry: _fetch(source, entry, look),
            listed,
            threads=_FETCH_THREADS,
            ahead=4 * _FETCH_THREADS,
        ):
            if seen is not None:
                memory.add(seen)
    finally:  # what was learnt before an error or Ctrl-C is not lost
        memory.flush()
    return memory.find(entries)


def _python(table: pa.Table) -> Iterator[dict[str, Any]]:
    columns = table.select(["key", "size_bytes", "tag"])
    for batch in columns.to_batches(max_chunksize=_CHUNK):
        yield from batch.to_pylist()


def _fetch(source: Storage, entry: Entry, look: Look_) -> Seen | None:
    """Read one file; a file that cannot be used is a finding, not an error."""
    try:
        content = source.read(entry.key)
    except MissingObject:
        return None
    facts = (entry.key, entry.size_bytes, entry.tag, hashlib.sha256(content).digest())
    try:
        return Seen(*facts, **look(content, entry.key))
    except DataError as error:
        return Seen(*facts, bad=without_name(error, entry.key), judge=decoder_name())


def _image_look(whole: bool) -> Look_:
    def look(content: bytes, key: str) -> dict[str, Any]:
        size = read_size(content, key)
        problem = decode_problem(content, key) if whole else None
        if problem:
            raise DataError(problem)
        return {"size": size}

    return look


def _look_at_mask(content: bytes, key: str) -> dict[str, Any]:
    height, width = decode_mask(content, key).shape
    return {"size": (width, height)}


def _look_at_caption(content: bytes, key: str) -> dict[str, Any]:
    return {"caption": read_caption(content)}


class _Image(NamedTuple):
    """What is known of one image; the names of columns."""

    key: str
    repeats: int
    concept: str | None
    text: str | None
    bad_text: str | None
    mask: str | None
    mask_name: bytes
    mask_size: Size | None
    bad_mask: str | None
    sha256: bytes | None
    width: int
    height: int
    bad: str | None


@dataclass
class _Made:
    """Rows in the making: columns of Python lists, cut into `Rows` now and then."""

    parts: list[Rows] = field(default_factory=list)
    lists: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self.lists.setdefault(name, []).append(value)

    def cut(self, number: int) -> None:
        """Turn what was collected into columns."""
        held = self.lists
        if not held:
            return
        count = len(held["key"])
        self.parts.append(
            Rows(
                keys=pa.array(held["key"], pa.string()),
                captions=pa.array(held["caption"], pa.large_string()),
                set=np.full(count, number, np.int16),
                repeats=np.array(held["repeats"], np.int32),
                bucket=np.array(held["bucket"], np.int32),
                original_size=np.array(held["size"], np.int32),
                latents_keys=key_columns(held["latents"]),
                text_keys=key_columns(held["texts"]),
                crops=np.array(held["crops"], np.int32),
                masks=pa.array(held["mask"], pa.string()),
            )
        )
        self.lists = {}


class _RowMaker:
    """Makes the rows of one set, a chunk at a time."""

    def __init__(
        self,
        number: int,
        options: SetOptions,
        data: DataOptions,
        listing: Listing,
        images: pa.Table,
        captions: pa.Table,
        masks: pa.Table | None,
    ) -> None:
        self._number, self._options, self._listing = number, options, listing
        self._images, self._captions, self._masks = images, captions, masks
        self._variants = variants_of(options, data)
        self._draws_pictures, self._draws_texts = options.draws_pictures, options.draws_texts
        self._namer = LatentsNamer(options)
        self._looks: dict[Size, Look] = {}
        self.training, self.held_out = _Made(), _Made()
        self.bad: list[BadSample] = []
        self.uncaptioned: list[str] = []

    def make(self) -> None:
        """Go through the images in order."""
        held = held_out_images(self._listing.images["key"], self._options)
        for start in range(0, len(self._images), _CHUNK):
            listed = self._listing.images.slice(start, _CHUNK)
            columns = [listed[name].to_pylist() for name in ("key", "repeats", "concept")]
            texts = self._texts(listed)
            masks = self._mask_facts(listed)
            seen = self._images.slice(start, _CHUNK)
            facts = [seen[name].to_pylist() for name in ("sha256", "width", "height", "bad")]
            for row, is_held in zip(
                zip(*columns, *texts, *masks, *facts, strict=True),
                held[start : start + _CHUNK].tolist(),
                strict=True,
            ):
                self._take(_Image(*row), is_held=is_held)
            self.training.cut(self._number)
            self.held_out.cut(self._number)

    def rows(self, made: _Made, variants: Variants) -> Rows:
        """What was made, as one."""
        return joined(made.parts) if made.parts else _no_rows(variants)

    def _texts(self, listed: pa.Table) -> tuple[list[str | None], list[str | None]]:
        """(what the caption file or the manifest says, why the caption file is bad)."""
        files = self._captions.take(listed["caption_file"])
        absent = is_set(listed["caption_file"]) & ~is_set(files["sha256"])
        bad = files["bad"].to_pylist()
        for index in np.flatnonzero(absent).tolist():
            bad[index] = "its caption file was deleted while the folder was read"
        written = files["caption"].to_pylist()
        given = listed["caption"].to_pylist()
        return [a if a is not None else b for a, b in zip(given, written, strict=True)], bad

    def _mask_facts(
        self, listed: pa.Table
    ) -> tuple[list[str | None], list[bytes], list[Size | None], list[str | None]]:
        """(the mask's key, what it adds to the latents' names, its size, what is wrong with it)."""
        count = len(listed)
        if self._masks is None:
            name = ALPHA if self._options.alpha_mask else b""
            return [None] * count, [name] * count, [None] * count, [None] * count
        keys = self._listing.masks["key"].take(listed["mask_file"]).to_pylist()
        found = self._masks.take(listed["mask_file"])
        names = found["sha256"].to_pylist()
        sizes = zip(found["width"].to_pylist(), found["height"].to_pylist(), strict=True)
        problems = [
            (bad and f"its mask {key}: {bad}")
            if name
            else f"no mask of its name in {self._options.mask_folder}"
            for key, name, bad in zip(keys, names, found["bad"].to_pylist(), strict=True)
        ]
        return keys, [name or b"" for name in names], list(sizes), problems

    def _take(self, image: _Image, *, is_held: bool) -> None:
        reason = image.bad or image.bad_text or image.bad_mask
        if image.sha256 is None or reason:
            reason = reason or "deleted while the folder was read"
            self.bad.append(BadSample(image.key, reason, self._number))
            return
        raw = caption_of(image.text, image.concept, self._options)
        if raw is None:
            self.uncaptioned.append(image.key)
            return
        try:
            self._add(image, image.sha256, caption_lines(raw, self._options), is_held=is_held)
        except DataError as error:
            self.bad.append(BadSample(image.key, str(error), self._number))

    def _add(self, image: _Image, sha256: bytes, caption: str, *, is_held: bool) -> None:
        number = sample_number(image.key, 0, self._number)
        size = (image.width, image.height)
        if image.mask_size:
            _check_mask(image.mask, image.mask_size, size)
        pictures = [PLAIN] if is_held else range(self._variants.pictures)
        texts = [PLAIN] if is_held else range(self._variants.texts)
        looks = [self._look(size, image.key, number, variant) for variant in pictures]
        (self.held_out if is_held else self.training).add(
            key=image.key,
            caption=caption,
            repeats=image.repeats,
            bucket=looks[0].geometry.bucket,
            size=size,
            latents=[self._namer.key(sha256, look, image.mask_name) for look in looks],
            crops=[true_crop(look) for look in looks],
            texts=[text_key(self._caption(caption, number, variant)) for variant in texts],
            mask=image.mask,
        )

    def _look(self, size: Size, key: str, number: int, variant: int) -> Look:
        if variant != PLAIN and self._draws_pictures:
            seed = self._variants.seed
            return draw_picture(self._options, size, key, number, seed=seed, variant=variant)
        look = self._looks.get(size)
        if look is None:
            look = draw_picture(self._options, size, key, number, seed=0, variant=PLAIN)
            if len(self._looks) >= _CHUNK:  # a bound, for images of a million sizes
                self._looks.clear()
            self._looks[size] = look
        return look

    def _caption(self, caption: str, number: int, variant: int) -> str:
        if variant == PLAIN or not self._draws_texts:
            return draw_caption(caption, self._options, None)
        seed = self._variants.seed
        return draw_text(self._options, caption, number, seed=seed, variant=variant)


def _check_mask(key: str | None, mask: Size, picture: Size) -> None:
    try:
        check_shape(mask, picture)
    except DataError as error:
        raise DataError(f"its mask {key}: {error}") from error


def held_out_images(keys: pa.ChunkedArray, options: SetOptions) -> NDArray[np.bool_]:
    """Which images are held out: the share of them whose hash is lowest.

    So an image keeps its side when others come or go, but for a few at the edge.
    """
    count = 0 if options.is_reg else round(options.validation_split * len(keys))
    held = np.zeros(len(keys), np.bool_)
    if count:
        hashes = [
            hashlib.blake2b(f"{options.validation_seed}\0{key}".encode(), digest_size=8).digest()
            for key in keys.to_pylist()
        ]
        held[np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")[:count]] = True
    return held


def _no_rows(variants: Variants) -> Rows:
    return Rows(
        keys=pa.array([], pa.string()),
        captions=pa.array([], pa.large_string()),
        set=np.empty(0, np.int16),
        repeats=np.empty(0, np.int32),
        bucket=np.empty((0, 2), np.int32),
        original_size=np.empty((0, 2), np.int32),
        latents_keys=np.empty((0, variants.pictures, 16), np.uint8),
        text_keys=np.empty((0, variants.texts, 16), np.uint8),
        crops=np.empty((0, variants.pictures, 2), np.int32),
        masks=pa.array([], pa.string()),
    )
