"""Doing one work item of a cache plan: fetch, decode, encode, put into the cache."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from raylora.base.encoder import Encoder
from raylora.base.errors import DataError, MissingObject
from raylora.base.log import get_logger
from raylora.base.storage import Storage, open_storage
from raylora.data.cache_write import ShardWriter
from raylora.data.decode import decode_image, decoder_name, encoder_input, fit_image
from raylora.data.plan import PlanFacts, WorkItem
from raylora.data.prefetch import map_ahead
from raylora.data.recipe import latents_key
from raylora.data.remembered import Seen, SourceMemory
from raylora.data.rows import BadSample
from raylora.data.source import DataOptions

log = get_logger("cache")

_DECODE_THREADS = 4
_DECODE_AHEAD = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ItemReport:
    """What became of a work item."""

    encoded: int
    bad: tuple[BadSample, ...]
    written_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Ready:
    """An image as the encoder takes it, and the facts kept beside its latents."""

    entry_key: bytes
    sample_key: str
    sha256: bytes
    pixels: NDArray[np.float32]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Failed:
    sample_key: str
    reason: str
    sha256: bytes = b""
    """Of the bytes at fault; empty when the failure is not one of bytes."""
    judge: str = ""


def run_item(
    facts: PlanFacts,
    item: WorkItem,
    encoder: Encoder,
    *,
    image_batch: int = 1,
    text_batch: int = 16,
) -> ItemReport:
    """Encode the entries of one item and leave them in the cache.

    An image that fails is remembered with its reason and left out; the rest goes on. May be run
    twice, or by two at once: the first to finish wins, and what the other wrote is never read.

    Args:
        image_batch: images encoded at once. 1 keeps an image's bits free of its batch mates.
        text_batch: captions encoded at once; short batches are filled up with "", for the same end.
    """
    began = time.monotonic()
    cache = open_storage(facts.cache_url)
    is_text = item.kind == "text"
    writer = ShardWriter(
        cache,
        facts.text_folder if is_text else facts.latents_folder,
        "text" if item.bucket is None else f"{item.bucket[0]}x{item.bucket[1]}",
        row_group_bytes=facts.row_group_bytes,
        flush_seconds=facts.flush_seconds,
    )
    if is_text:
        failed: list[_Failed] = []
        _encode_texts(item, encoder, writer, text_batch)
    else:
        failed = _encode_images(facts, item, encoder, writer, image_batch)
    writer.flush()
    bad = tuple(BadSample(one.sample_key, one.reason) for one in failed)
    report = ItemReport(
        len(item.entries) - len(bad), bad, writer.written_bytes, time.monotonic() - began
    )
    log.info(
        "%s %s: %d encoded, %d bad, %.1f s",
        *(item.kind, item.bucket or "", report.encoded, len(bad), report.seconds),
    )
    return report


def _encode_texts(item: WorkItem, encoder: Encoder, writer: ShardWriter, batch: int) -> None:
    for entries in _batches(item.entries, batch):
        captions = [caption for _, caption in entries]
        filled = captions + [""] * (batch - len(captions))
        tensors = encoder.encode_texts(filled)
        for number, (key, caption) in enumerate(entries):
            row = {name: tensor[number] for name, tensor in tensors.items()}
            if not _is_finite(row):
                raise DataError(
                    f"The text encoder gave NaN or infinity for the caption {caption!r}. Load it "
                    "in a wider dtype (bfloat16 or float32)."
                )
            writer.add(key, row, {"caption": caption})


def _encode_images(
    facts: PlanFacts, item: WorkItem, encoder: Encoder, writer: ShardWriter, batch: int
) -> list[_Failed]:
    source = open_storage(facts.data.folder)
    failed: list[_Failed] = []

    def load(entry: tuple[bytes, str]) -> _Ready | _Failed:
        return _load(source, facts.data, *entry)

    loaded = map_ahead(load, item.entries, threads=_DECODE_THREADS, ahead=_DECODE_AHEAD)
    for images in _batches(_good(loaded, failed), batch):
        tensors = encoder.encode_images(np.stack([image.pixels for image in images]))
        for number, image in enumerate(images):
            row = {name: tensor[number] for name, tensor in tensors.items()}
            if _is_finite(row):
                writer.add(image.entry_key, row, image.facts)
            else:
                reason = "the image encoder gave NaN or infinity; try it in a wider dtype"
                failed.append(_Failed(image.sample_key, reason, image.sha256, facts.latents_folder))
    _remember(facts, source, failed)
    return failed


def _good(loaded: Iterable[_Ready | _Failed], failed: list[_Failed]) -> Iterator[_Ready]:
    for one in loaded:
        if isinstance(one, _Failed):
            failed.append(one)
        else:
            yield one


def _load(source: Storage, data: DataOptions, entry_key: bytes, key: str) -> _Ready | _Failed:
    """Fetch and decode one image, and bring it to its bucket."""
    try:
        content = source.read(key)
    except MissingObject:
        return _Failed(key, "deleted since the folder was listed")
    digest = hashlib.sha256(content).digest()
    try:
        pixels = decode_image(content, key, data.colour)
    except DataError as error:
        reason = str(error).removeprefix(f"{key}: ")
        return _Failed(key, reason, digest, decoder_name())
    size = (pixels.shape[1], pixels.shape[0])
    geometry = data.buckets.place(size, data.fit)
    if latents_key(digest, geometry, data.fit) != entry_key:
        return _Failed(key, "changed since the folder was listed; run the same command again")
    facts = {
        "key": key,
        "sha256": digest.hex(),
        "original_size": size,
        "resized": geometry.resized,
        "crop": geometry.crop,
        "paste": geometry.paste,
    }
    return _Ready(
        entry_key, key, digest, encoder_input(fit_image(pixels, geometry, data.colour)), facts
    )


def _remember(facts: PlanFacts, source: Storage, failed: list[_Failed]) -> None:
    """Note bad images beside the other sources, so that the next run does not fetch them."""
    memory = SourceMemory(open_storage(facts.cache_url), facts.sources_folder)
    for one in failed:
        entry = source.entry(one.sample_key) if one.sha256 else None
        # The file may have been repaired meanwhile; a verdict on old bytes must not stick to it.
        if entry and hashlib.sha256(source.read(entry.key)).digest() == one.sha256:
            memory.add(
                Seen(
                    *(entry.key, entry.size_bytes, entry.tag, one.sha256),
                    bad=one.reason,
                    judge=one.judge,
                )
            )
    memory.flush()


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _is_finite(tensors: dict[str, NDArray[Any]]) -> bool:
    return all(
        bool(np.isfinite(tensor).all())
        for tensor in tensors.values()
        if np.issubdtype(tensor.dtype, np.floating)
    )
