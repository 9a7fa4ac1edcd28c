"""What a data set consists of and what is still to be encoded, learnt with as few reads as can be.

`prepare` lists the folder, fetches files that are new or changed to learn their hash, size and
caption, and compares with the cache. The work that is missing is cut into items that any process
can do with nothing but the item and the plan's facts.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from raylora.base.errors import DataError, MissingObject
from raylora.base.log import get_logger
from raylora.base.storage import Entry, Storage, open_storage
from raylora.data.bucket import Size
from raylora.data.cache_index import CacheIndex
from raylora.data.cache_write import ROW_GROUP_BYTES
from raylora.data.captions import caption_of, read_caption
from raylora.data.decode import decoder_name, read_size
from raylora.data.prefetch import map_ahead
from raylora.data.quarantine import check_bad_share, write_quarantine
from raylora.data.recipe import (
    Kind,
    latents_key,
    latents_recipe,
    text_key,
    text_recipe,
    write_recipe,
)
from raylora.data.remembered import Seen, SourceMemory, sources_folder
from raylora.data.rows import BadSample, Row
from raylora.data.source import DataOptions, Sample, read_listing

log = get_logger("data")

_FETCH_THREADS = 16
# Entries in a work item at most: enough for a shard, little enough to share out and to repeat.
ITEM_ENTRIES = 1024
_NAMED = 5


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Entries for one process to encode and put into one shard, or a few."""

    kind: Kind
    bucket: Size | None
    """The bucket of latents; None for text."""
    entries: tuple[tuple[bytes, str], ...]
    """Entry key, and the image's key or the caption."""


@dataclass(frozen=True)
class PlanFacts:
    """All that a work item needs besides itself; small, and safe to send to another machine."""

    data: DataOptions
    cache_url: str
    latents_folder: str
    text_folder: str
    sources_folder: str
    """Where verdicts on files go, though a worker may know the data folder by another path."""
    row_group_bytes: int = ROW_GROUP_BYTES
    flush_seconds: float = 60.0


@dataclass(frozen=True)
class CachePlan:
    """The data set as it will be once `items` are done."""

    facts: PlanFacts
    rows: tuple[Row, ...]
    """Good so far, sorted by key; an image may still turn out bad when it is decoded whole."""
    bad: tuple[BadSample, ...]
    items: tuple[WorkItem, ...]
    """What is missing in the cache."""
    notes: tuple[str, ...]
    """What a person should know about files that are not used."""

    def missing(self, kind: Kind) -> int:
        """How many latents, or texts, are still to be encoded."""
        return sum(len(item.entries) for item in self.items if item.kind == kind)


def prepare(
    data: DataOptions,
    cache_url: str,
    *,
    latents_facts: dict[str, Any],
    text_facts: dict[str, Any],
    workers: int = 1,
    rehash: bool = False,
    extra_captions: Sequence[str] = (),
    item_entries: int = ITEM_ENTRIES,
    row_group_bytes: int = ROW_GROUP_BYTES,
) -> CachePlan:
    """List a data set and name what the cache lacks; encodes nothing, needs no encoder.

    Args:
        data: the job's `data:` section.
        cache_url: where the cache is, or is to be.
        latents_facts, text_facts: what names the encoders' recipes, JSON values only.
        workers: how many will share the work; there are twice as many items where entries allow.
        rehash: fetch every file again instead of trusting its size and tag.
        extra_captions: texts to encode beside the captions and "", which is always there.
        item_entries: entries in a work item at most.
        row_group_bytes: how much a reader fetches at a time.

    Raises:
        DataError: there are no images, captions are missing, or more than `data.max_bad` are bad.
    """
    source, cache = open_storage(data.folder), open_storage(cache_url)
    listing = read_listing(source, data)
    for note in listing.notes:
        log.warning("%s", note)
    latents_folder = write_recipe(cache, latents_recipe(latents_facts, data))
    text_folder = write_recipe(cache, text_recipe(text_facts))
    memory = SourceMemory(
        cache, sources_folder(source.url), judges=(decoder_name(), latents_folder)
    )
    memory.load()
    seen = _look_at(source, listing.samples, memory, trust=not rehash)
    rows, bad = _rows(listing.samples, seen, data)
    write_quarantine(cache, source.url, bad)
    check_bad_share(bad, len(listing.samples), data, cache.url)

    images = {row.latents_key: row for row in rows}
    texts = {text_key(text): text for text in ("", *extra_captions, *(row.caption for row in rows))}
    latents = _absent(CacheIndex(cache, latents_folder), images)
    text = _absent(CacheIndex(cache, text_folder), texts)
    items = [
        *_latents_items([images[key] for key in latents], workers, item_entries),
        *_text_items([(key, texts[key]) for key in text], workers, item_entries),
    ]
    log.info(
        "%d images, %d bad; to encode: %d of %d latents, %d of %d texts",
        *(len(listing.samples), len(bad), len(latents), len(images), len(text), len(texts)),
    )
    facts = PlanFacts(
        *(data, cache.url, latents_folder, text_folder, sources_folder(source.url)),
        row_group_bytes=row_group_bytes,
    )
    return CachePlan(facts, tuple(rows), tuple(bad), tuple(items), tuple(listing.notes))


def _look_at(
    source: Storage, samples: list[Sample], memory: SourceMemory, *, trust: bool
) -> dict[str, Seen]:
    """What every file of the data set holds, fetching those that are new or changed."""
    images = {sample.image.key: sample.image for sample in samples}
    captions = {sample.caption.key: sample.caption for sample in samples if sample.caption}
    entries = images | captions
    seen = {key: memory.get(entry) if trust else None for key, entry in entries.items()}
    fresh = [entries[key] for key, known in seen.items() if known is None]

    def look(entry: Entry) -> Seen:
        return _fetch(source, entry, is_image=entry.key in images)

    try:
        for found in map_ahead(look, fresh, threads=_FETCH_THREADS, ahead=4 * _FETCH_THREADS):
            seen[found.key] = found
            if found.sha256:
                memory.add(found)
    finally:  # what was learnt before an error or Ctrl-C is not lost
        memory.flush()
    return {key: known for key, known in seen.items() if known is not None}


def _fetch(source: Storage, entry: Entry, *, is_image: bool) -> Seen:
    """Read one file; a file that cannot be used is a finding, not an error."""
    facts = (entry.key, entry.size_bytes, entry.tag)
    try:
        data = source.read(entry.key)
    except MissingObject:
        return Seen(*facts, b"", bad="deleted while the folder was read")
    digest = hashlib.sha256(data).digest()
    try:
        if is_image:
            return Seen(*facts, digest, size=read_size(data, entry.key))
        return Seen(*facts, digest, caption=read_caption(data))
    except DataError as error:
        reason = str(error).removeprefix(f"{entry.key}: ")
        return Seen(*facts, digest, bad=reason, judge=decoder_name())


def _rows(
    samples: list[Sample], seen: dict[str, Seen], data: DataOptions
) -> tuple[list[Row], list[BadSample]]:
    rows: list[Row] = []
    bad: list[BadSample] = []
    uncaptioned: list[str] = []
    for sample in samples:
        image = seen[sample.image.key]
        caption = seen[sample.caption.key] if sample.caption else None
        reason = image.bad or (caption and caption.bad)
        if reason:
            bad.append(BadSample(sample.key, reason))
            continue
        try:
            text = caption_of(sample, caption.caption if caption else None, data)
        except DataError as error:
            uncaptioned.append(str(error))
            continue
        try:
            rows.append(_row(sample, image, text, data))
        except DataError as error:
            bad.append(BadSample(sample.key, str(error)))
    if uncaptioned:
        raise DataError(_without_caption(uncaptioned))
    return rows, bad


def _row(sample: Sample, image: Seen, caption: str, data: DataOptions) -> Row:
    geometry = data.buckets.place(image.size, data.fit)
    return Row(
        key=sample.key,
        repeats=sample.repeats,
        bucket=geometry.bucket,
        latents_key=latents_key(image.sha256, geometry, data.fit),
        text_key=text_key(caption),
        caption=caption,
        original_size=image.size,
        crop=geometry.crop,
    )


def _without_caption(messages: list[str]) -> str:
    if len(messages) == 1:
        return messages[0]
    others = [message.partition(":")[0] for message in messages[1:]]
    more = ", …" if len(others) > _NAMED else "."
    return f"{messages[0]} So have {len(others)} more: {', '.join(others[:_NAMED])}{more}"


def _absent(index: CacheIndex, keys: Iterable[bytes]) -> list[bytes]:
    wanted = list(keys)
    cached = index.contains(wanted)
    return [key for key, here in zip(wanted, cached, strict=True) if not here]


def _latents_items(rows: list[Row], workers: int, most: int) -> Iterable[WorkItem]:
    buckets: dict[Size, list[tuple[bytes, str]]] = defaultdict(list)
    for row in rows:
        buckets[row.bucket].append((row.latents_key, row.key))
    size = _item_size(len(rows), workers, most)
    for bucket, entries in sorted(buckets.items()):
        yield from (WorkItem("latents", bucket, part) for part in _parts(entries, size))


def _text_items(entries: list[tuple[bytes, str]], workers: int, most: int) -> Iterable[WorkItem]:
    size = _item_size(len(entries), workers, most)
    yield from (WorkItem("text", None, part) for part in _parts(entries, size))


def _parts(entries: list[tuple[bytes, str]], size: int) -> Iterable[tuple[tuple[bytes, str], ...]]:
    """Parts of about equal length, none above `size`."""
    count = -(-len(entries) // size)
    ends = [len(entries) * part // count for part in range(count + 1)] if count else []
    return (tuple(entries[start:end]) for start, end in pairwise(ends))


def _item_size(entries: int, workers: int, most: int) -> int:
    """Entries per item: two items for each worker, so that a slow one delays the rest less."""
    return max(1, min(most, entries // (2 * workers)))
