"""Doing one work item of a cache plan: fetch, decode, encode, put into the cache."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from raylora.base.encoder import Encoder
from raylora.base.errors import DataError, MissingObject
from raylora.base.log import get_logger
from raylora.base.seeds import sample_number
from raylora.base.storage import open_storage
from raylora.data.cache.recipe import LatentsNamer
from raylora.data.cache.write import ShardWriter
from raylora.data.pixels.decode import decoder_name
from raylora.data.pixels.masks import latent_mask
from raylora.data.pixels.pictures import ImageFile, PictureSource, Shown
from raylora.data.plan import Picture, PlanFacts, WorkItem
from raylora.data.prefetch import map_ahead
from raylora.data.rows import BadSample
from raylora.data.sources.remembered import Seen, SourceMemory
from raylora.data.variants import draw_picture

log = get_logger("cache")

_DECODE_THREADS = 4
_DECODE_AHEAD = 8

T = TypeVar("T")
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ItemReport:
    """What became of a work item."""

    encoded: int
    bad: tuple[BadSample, ...]
    written_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Ready:
    """A picture as the encoder takes it, and the facts kept beside its latents."""

    entry_key: bytes
    key: str
    sha256: bytes
    shown: Shown
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Failed:
    key: str
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
    bad = {one.key: BadSample(one.key, one.reason, item.set) for one in failed}
    lost = sum(len(picture.looks) for picture in item.pictures if picture.key in bad)
    report = ItemReport(
        item.count - lost, tuple(bad.values()), writer.written_bytes, time.monotonic() - began
    )
    log.info(
        "%s %s: %d encoded, %d bad, %.1f s",
        *(item.kind, item.bucket or "", report.encoded, len(bad), report.seconds),
    )
    return report


def encode_pictures(encoder: Encoder, shown: Sequence[Shown]) -> list[Tensors]:
    """The tensors of pictures of one bucket, with their masks in latent cells."""
    tensors = encoder.encode_images(np.stack([one.pixels for one in shown]))
    rows = []
    for number, one in enumerate(shown):
        row = {name: tensor[number] for name, tensor in tensors.items()}
        if one.mask is not None:
            height, width = row["latents"].shape[-2:]
            row["mask"] = latent_mask(one.mask, (height, width))
        rows.append(row)
    return rows


def encode_captions(encoder: Encoder, captions: Sequence[str], batch: int) -> list[Tensors]:
    """The tensors of at most `batch` captions, encoded as if there were `batch` of them.

    Raises:
        DataError: the encoder gave NaN or infinity.
    """
    (rows,) = encode_caption_batches(encoder, [captions], batch)
    return rows


def encode_caption_batches(
    encoder: Encoder, batches: Sequence[Sequence[str]], batch: int
) -> Iterator[list[Tensors]]:
    """`encode_captions` of each batch."""
    filled = [[*captions, *[""] * (batch - len(captions))] for captions in batches]
    for tensors, captions in zip(encoder.encode_batches(filled), batches, strict=True):
        yield _text_rows(tensors, captions)


def _text_rows(tensors: Tensors, captions: Sequence[str]) -> list[Tensors]:
    rows = [
        {name: tensor[number] for name, tensor in tensors.items()}
        for number in range(len(captions))
    ]
    for row, caption in zip(rows, captions, strict=True):
        if not is_finite(row):
            raise DataError(
                f"The text encoder gave NaN or infinity for the caption {caption!r}. Load it in a "
                "wider dtype (bfloat16 or float32)."
            )
    return rows


def is_finite(tensors: Mapping[str, NDArray[Any]]) -> bool:
    """Whether no tensor holds NaN or infinity."""
    return all(
        bool(np.isfinite(tensor).all())
        for tensor in tensors.values()
        if np.issubdtype(tensor.dtype, np.floating)
    )


def _encode_texts(item: WorkItem, encoder: Encoder, writer: ShardWriter, batch: int) -> None:
    parts = list(_batches(item.texts, batch))
    captions = [[caption for _, caption in entries] for entries in parts]
    found = encode_caption_batches(encoder, captions, batch)
    for entries, rows in zip(parts, found, strict=True):
        for (key, caption), row in zip(entries, rows, strict=True):
            writer.add(key, row, {"caption": caption})


def _encode_images(
    facts: PlanFacts, item: WorkItem, encoder: Encoder, writer: ShardWriter, batch: int
) -> list[_Failed]:
    options = facts.sets[item.set]
    source = PictureSource(options, open_storage(facts.cache_url))
    loader = _Loader(source, item.set, facts.data.variant_seed)
    failed: list[_Failed] = []
    loaded = map_ahead(loader.load, item.pictures, threads=_DECODE_THREADS, ahead=_DECODE_AHEAD)
    for images in _batches(_good(loaded, failed), batch):
        rows = encode_pictures(encoder, [image.shown for image in images])
        for image, row in zip(images, rows, strict=True):
            if is_finite(row):
                writer.add(image.entry_key, row, image.facts)
            else:
                reason = "the image encoder gave NaN or infinity; try it in a wider dtype"
                failed.append(_Failed(image.key, reason, image.sha256, facts.latents_folder))
    _remember(facts, item.set, source, failed)
    return failed


def _good(loaded: Iterable[list[_Ready] | _Failed], failed: list[_Failed]) -> Iterator[_Ready]:
    for one in loaded:
        if isinstance(one, _Failed):
            failed.append(one)
        else:
            yield from one


class _Loader:
    """Fetches and decodes images, and brings them to their buckets."""

    def __init__(self, source: PictureSource, of_set: int, variant_seed: int) -> None:
        self._source, self._set, self._seed = source, of_set, variant_seed
        self._namer = LatentsNamer(source.options)

    def load(self, picture: Picture) -> list[_Ready] | _Failed:
        """All pictures of an image that are missing, or why there are none."""
        key = picture.key
        try:
            content = self._source.storage.read(key)
        except MissingObject:
            return _Failed(key, "deleted since the folder was listed")
        digest = hashlib.sha256(content).digest()
        try:
            file = self._source.open(key, content, picture.mask)
            ready = [self._show(file, entry, variant) for entry, variant in picture.looks]
        except MissingObject:
            return _Failed(key, "its mask was deleted since the folder was listed")
        except DataError as error:
            return _Failed(key, str(error), digest, decoder_name())
        if None in ready:
            return _Failed(key, "changed since the folder was listed; run the same command again")
        return [one for one in ready if one is not None]

    def _show(self, file: ImageFile, entry_key: bytes, variant: int) -> _Ready | None:
        """One picture of an image; None where it is not what was asked for."""
        number = sample_number(file.key, 0, self._set)
        options, seed = self._source.options, self._seed
        look = draw_picture(options, file.size, file.key, number, seed=seed, variant=variant)
        if self._namer.key(file.sha256, look, file.mask_name) != entry_key:
            return None
        place = look.geometry
        facts: dict[str, Any] = {
            "key": file.key,
            "sha256": file.sha256.hex(),
            "original_size": file.size,
            "resized": place.resized,
            "crop": place.crop,
            "paste": place.paste,
        }
        if options.draws_pictures:
            facts |= {"flip": look.flip, "hue": look.hue, "gamma": look.gamma}
        return _Ready(entry_key, file.key, file.sha256, self._source.show(file, look), facts)


def _remember(
    facts: PlanFacts, of_set: int, source: PictureSource, failed: Sequence[_Failed]
) -> None:
    """Note bad images beside the other sources, so that the next run does not fetch them."""
    memory = SourceMemory(open_storage(facts.cache_url), facts.memory_folders[of_set])
    storage = source.storage
    for one in failed:
        entry = storage.entry(one.key) if one.sha256 else None
        # The file may have been repaired meanwhile; a verdict on old bytes must not stick to it.
        if entry and hashlib.sha256(storage.read(entry.key)).digest() == one.sha256:
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
