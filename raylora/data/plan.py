"""What a data set consists of and what is still to be encoded.

`prepare` examines every set, balances regularisation images, and compares with the cache. The work
that is missing is cut into items that any process can do with nothing but the item and the plan's
facts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylora.base.errors import DataError
from raylora.base.log import get_logger
from raylora.base.storage import Storage, open_storage
from raylora.data.balance import balanced_repeats
from raylora.data.cache.index import CacheIndex
from raylora.data.cache.recipe import Kind, latents_recipe, text_key, text_recipe, write_recipe
from raylora.data.cache.write import ROW_GROUP_BYTES
from raylora.data.examine import Examined, Memories, examine_set
from raylora.data.options import DataOptions, SetOptions
from raylora.data.pixels.bucket import Size
from raylora.data.pixels.decode import decoder_name
from raylora.data.quarantine import check_bad_share, write_quarantine
from raylora.data.rows import KEY_BYTES, BadSample, Rows, joined
from raylora.data.variants import PLAIN, draw_text

log = get_logger("data")

# Entries in a work item at most: enough for a shard, little enough to share out and to repeat.
ITEM_ENTRIES = 1024
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of which latents are missing."""

    key: str
    mask: str | None
    """The mask's key, where the set has a mask folder."""
    looks: tuple[tuple[bytes, int], ...]
    """Entry key and variant of each picture that is missing; PLAIN for a held-out image."""


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Entries for one process to encode and put into one shard, or a few."""

    kind: Kind
    set: int = 0
    """Whose pictures they are."""
    bucket: Size | None = None
    """The bucket of latents; None for text."""
    pictures: tuple[Picture, ...] = ()
    texts: tuple[tuple[bytes, str], ...] = ()
    """Entry key and caption."""

    @property
    def count(self) -> int:
        """How many entries it makes."""
        return len(self.texts) + sum(len(picture.looks) for picture in self.pictures)


@dataclass(frozen=True)
class PlanFacts:
    """All that a work item needs besides itself; small, and safe to send to another machine."""

    data: DataOptions
    sets: tuple[SetOptions, ...]
    cache_url: str
    latents_folder: str
    text_folder: str
    folders: tuple[str, ...]
    """URL of each set's images, as the planner names it."""
    memory_folders: tuple[str, ...]
    """Where verdicts on files go, though a worker may know the data folder by another path."""
    row_group_bytes: int = ROW_GROUP_BYTES
    flush_seconds: float = 60.0


@dataclass(frozen=True)
class CachePlan:
    """The data set as it will be once `items` are done."""

    facts: PlanFacts
    rows: Rows
    """Good so far, sets in their order, each sorted by key; an image may still turn out bad when it
    is decoded whole."""
    held_out: Rows
    """Rows of `validation_split`."""
    bad: tuple[BadSample, ...]
    items: tuple[WorkItem, ...]
    """What is missing in the cache."""
    notes: tuple[str, ...]
    """What a person should know about files that are not used."""
    images: int
    """How many were listed, bad ones too."""

    def missing(self, kind: Kind) -> int:
        """How many latents, or texts, are still to be encoded."""
        return sum(item.count for item in self.items if item.kind == kind)


def prepare(
    data: DataOptions,
    sets: Sequence[SetOptions],
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
        sets: its sets, whole (`options.resolve`).
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
    cache = open_storage(cache_url)
    latents_folder = write_recipe(cache, latents_recipe(latents_facts))
    text_folder = write_recipe(cache, text_recipe(text_facts))
    memories = Memories(cache, (decoder_name(), latents_folder))
    examined = [
        examine_set(number, options, data, cache, memories, trust=not rehash)
        for number, options in enumerate(sets)
    ]
    notes = [note for one in examined for note in one.notes]
    bad = [sample for one in examined for sample in one.bad]
    listed = sum(one.images for one in examined)
    write_quarantine(cache, [one.folder for one in examined], bad)
    _check_captions(examined, sets)
    check_bad_share(bad, listed, data, cache.url)
    rows = _balanced([one.training for one in examined], sets, notes)
    held_out = joined([one.held_out for one in examined])
    for note in notes:
        log.warning("%s", note)
    facts = PlanFacts(
        data,
        tuple(sets),
        cache.url,
        latents_folder,
        text_folder,
        folders=tuple(one.folder for one in examined),
        memory_folders=tuple(one.memory_folder for one in examined),
        row_group_bytes=row_group_bytes,
    )
    items = _Missing(facts, cache, rows, held_out, extra_captions).items(workers, item_entries)
    plan = CachePlan(facts, rows, held_out, tuple(bad), tuple(items), tuple(notes), listed)
    log.info(
        "%d images, %d bad; to encode: %d pictures, %d captions",
        *(listed, len(bad), plan.missing("latents"), plan.missing("text")),
    )
    return plan


def _balanced(parts: list[Rows], sets: Sequence[SetOptions], notes: list[str]) -> Rows:
    """All rows, with regularisation images shown as often as the others of their group."""
    for group in sorted({options.group for options in sets if options.is_reg}):
        members = [number for number, options in enumerate(sets) if options.group == group]
        reg = [number for number in members if sets[number].is_reg]
        target = sum(int(parts[number].repeats.sum()) for number in members if number not in reg)
        if not target:
            raise DataError(
                f"data: the regularisation images of group {group} have no other images to keep "
                "the balance with. Add a set of the same group without is_reg."
            )
        showings = balanced_repeats(
            np.concatenate([parts[number].repeats for number in reg]).astype(np.int64), target
        )
        left_out = int((showings == 0).sum())
        if left_out:
            notes.append(
                f"{left_out} of {len(showings)} regularisation images are not used: the first "
                f"{len(showings) - left_out} are as many showings as the {target} of the others."
            )
        ends = np.cumsum([len(parts[number]) for number in reg])[:-1]
        for number, part in zip(reg, np.split(showings, ends), strict=True):
            shown = replace(parts[number], repeats=part.astype(np.int32))
            parts[number] = shown.take(part > 0)
    return joined(parts)


def _check_captions(examined: Sequence[Examined], sets: Sequence[SetOptions]) -> None:
    """Refuse images without any caption, naming the first few."""
    for one, options in zip(examined, sets, strict=True):
        if not one.uncaptioned:
            continue
        looked_for = " and ".join(options.caption_extensions) or "no ending"
        first, *others = one.uncaptioned
        named = ", ".join(others[:_NAMED]) + (", …" if len(others) > _NAMED else ".")
        more = f" So have {len(others)} more: {named}" if others else ""
        raise DataError(
            f"{first}: no caption beside the image (looked for {looked_for}). Write one, set "
            f"data.default_caption, or put the image in a folder named N_concept.{more}"
        )


class _Missing:
    """Finds what the cache lacks, and cuts it into work items."""

    def __init__(
        self,
        facts: PlanFacts,
        cache: Storage,
        rows: Rows,
        held_out: Rows,
        extra_captions: Sequence[str],
    ) -> None:
        self._facts, self._rows, self._held_out = facts, rows, held_out
        self._latents = CacheIndex(cache, facts.latents_folder)
        self._texts = CacheIndex(cache, facts.text_folder)
        self._extra = extra_captions

    def items(self, workers: int, most: int) -> list[WorkItem]:
        """What is missing: pictures of one bucket together, then captions."""
        pictures: dict[tuple[int, Size], list[Picture]] = defaultdict(list)
        for number, bucket, picture in self._pictures():
            pictures[number, bucket].append(picture)
        texts = list(self._captions())
        count = sum(len(one.looks) for found in pictures.values() for one in found)
        found = []
        for (number, bucket), missing in sorted(pictures.items(), key=lambda pair: pair[0]):
            size = _item_size(count, workers, most)
            weights = [len(picture.looks) for picture in missing]
            for start, end in _parts(weights, size):
                found.append(WorkItem("latents", number, bucket, tuple(missing[start:end])))
        size = _item_size(len(texts), workers, most)
        for start, end in _parts([1] * len(texts), size):
            found.append(WorkItem("text", texts=tuple(texts[start:end])))
        return found

    def _pictures(self) -> Iterator[tuple[int, Size, Picture]]:
        live = self._facts.data.pictures_live
        sides = [self._held_out] if live else [self._rows, self._held_out]
        for rows, absent in zip(
            sides, _absent(self._latents, [rows.latents_keys for rows in sides]), strict=True
        ):
            plain = rows is self._held_out
            for index in np.flatnonzero(absent.any(axis=1)).tolist():
                row = rows[index]
                looks = tuple(
                    (row.latents_keys[variant], PLAIN if plain else variant)
                    for variant in np.flatnonzero(absent[index]).tolist()
                )
                yield row.set, row.bucket, Picture(row.key, row.mask, looks)

    def _captions(self) -> Iterator[tuple[bytes, str]]:
        extra = {text_key(text): text for text in ("", *self._extra)}
        here = self._texts.contains(list(extra))
        yield from (pair for pair, known in zip(extra.items(), here, strict=True) if not known)
        live = self._facts.data.texts_live
        sides = [self._held_out] if live else [self._rows, self._held_out]
        seed = self._facts.data.variant_seed
        for rows, absent in zip(
            sides, _absent(self._texts, [rows.text_keys for rows in sides]), strict=True
        ):
            plain = rows is self._held_out
            for index in np.flatnonzero(absent.any(axis=1)).tolist():
                row = rows[index]
                options = self._facts.sets[row.set]
                for variant in np.flatnonzero(absent[index]).tolist():
                    draw = PLAIN if plain else variant
                    text = draw_text(options, row.caption, row.number, seed=seed, variant=draw)
                    key = row.text_keys[variant]
                    assert key == text_key(text)
                    if key not in extra:
                        yield key, text


def _absent(index: CacheIndex, sides: list[NDArray[np.uint8]]) -> list[NDArray[np.bool_]]:
    """For each side (N, V, 16): which entries are to be made, an entry of many rows once."""
    flat = [keys.reshape(-1, KEY_BYTES) for keys in sides]
    every = np.ascontiguousarray(np.concatenate(flat))
    names = every.view(f"S{KEY_BYTES}").ravel()
    wanted = np.zeros(len(names), np.bool_)
    wanted[np.unique(names, return_index=True)[1]] = True
    wanted &= ~index.contains(names)
    ends = np.cumsum([len(part) for part in flat])[:-1]
    parts = np.split(wanted, ends)
    return [part.reshape(keys.shape[:2]) for part, keys in zip(parts, sides, strict=True)]


def _parts(weights: Sequence[int], size: int) -> Iterable[tuple[int, int]]:
    """Where to cut: parts of about equal weight, none far above `size`."""
    total = sum(weights)
    count = -(-total // size)
    sums = np.cumsum([0, *weights])
    cuts = np.searchsorted(
        sums, [total * part / count for part in range(count + 1)] if count else []
    )
    return ((start, end) for start, end in pairwise(cuts.tolist()) if end > start)


def _item_size(entries: int, workers: int, most: int) -> int:
    """Entries per item: two items for each worker, so that a slow one delays the rest less."""
    return max(1, min(most, entries // (2 * workers)))
