"""A data set ready for training: rows, and their cached tensors on request.

The road with Ray is `prepare`, `run_item` on any machine, `load_dataset`; without it,
`prepare_and_encode` does the three in one process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raylora.base.encoder import Encoder
from raylora.base.errors import DataError, RayloraError
from raylora.base.log import get_logger
from raylora.base.storage import open_storage
from raylora.base.units import GIB
from raylora.data.cache.index import CacheIndex
from raylora.data.cache.local import default_local_folder
from raylora.data.cache.read import CacheReader
from raylora.data.cache.recipe import text_key
from raylora.data.encode import ItemReport, run_item
from raylora.data.options import DataOptions, SetOptions
from raylora.data.pixels.decode import decoder_name
from raylora.data.pixels.pictures import PictureSource
from raylora.data.plan import CachePlan, PlanFacts, WorkItem, prepare
from raylora.data.quarantine import check_bad_share, write_quarantine
from raylora.data.rows import KEY_BYTES, BadSample, Row, Rows
from raylora.data.sources.remembered import SourceMemory

log = get_logger("cache")

__all__ = [
    "BadSample",
    "CachePlan",
    "Dataset",
    "Encoder",
    "ItemReport",
    "PlanFacts",
    "Row",
    "Rows",
    "WorkItem",
    "load_dataset",
    "prepare",
    "prepare_and_encode",
    "run_item",
]


class BalanceChanged(DataError):
    """Planning again, now that all bad images are known, gives the rows that every start will."""


@dataclass(frozen=True)
class Dataset:
    """Rows whose tensors are cached; pickles without them, opens the cache where it lands."""

    rows: Rows
    """Sets in their order, each sorted by key."""
    bad: tuple[BadSample, ...]
    facts: PlanFacts
    local_dir: str | None = None
    """Folder of the local cache; None is `default_local_folder` of the machine it lands on."""
    held_out: Dataset | None = None
    """Rows of `validation_split`, with nothing about them drawn."""

    def fetch(self, rows: Sequence[Row]) -> list[dict[str, NDArray[Any]]]:
        """The tensors of each row's first variants, latents and text together, read-only."""
        latents = self.fetch_pictures([row.latents_key for row in rows])
        texts = self.fetch_texts([row.text_key for row in rows])
        return [{**text, **image} for image, text in zip(latents, texts, strict=True)]

    def fetch_pictures(self, keys: Sequence[bytes]) -> list[dict[str, NDArray[Any]]]:
        """Cached pictures by their names, as read-only arrays."""
        return self._latents.get(keys)

    def fetch_texts(self, keys: Sequence[bytes]) -> list[dict[str, NDArray[Any]]]:
        """Cached captions by their names; `text_key("")` is always among them."""
        return self._texts.get(keys)

    def fill(self) -> None:
        """Begin to bring what the rows need to the local disk, in the background, as it fits."""
        if "_filling" not in self.__dict__:
            stop = threading.Event()
            thread = threading.Thread(target=self._fill, args=(stop,), name="cache-fill")
            thread.daemon = True
            self._open()  # here, since two threads might open the same twice
            self.__dict__["_filling"] = (thread, stop)
            thread.start()

    def _open(self) -> None:
        if not self.facts.data.pictures_live:
            _ = self._latents
        if not self.facts.data.texts_live:
            _ = self._texts

    def _fill(self, stop: threading.Event) -> None:
        data, left = self.facts.data, self._max_bytes
        try:
            if not data.pictures_live:
                left -= self._latents.fill(_names(self.rows.latents_keys), left, stop)
            if not data.texts_live:
                empty = np.frombuffer(text_key(""), f"S{KEY_BYTES}")
                self._texts.fill(np.append(_names(self.rows.text_keys), empty), left, stop)
        except (RayloraError, OSError, pa.ArrowException) as error:
            # Whoever needs an entry reads it by itself, and tells what is wrong if that fails too.
            log.warning("the local cache is not filled: %s", error)

    def close(self) -> None:
        """Let go of files and threads; the next fetch opens them again."""
        filling: tuple[threading.Thread, threading.Event] | None
        filling = self.__dict__.pop("_filling", None)
        if filling is not None:
            filling[1].set()
            filling[0].join()
        for name in ("_latents", "_texts"):
            reader: CacheReader | None = self.__dict__.pop(name, None)
            if reader is not None:
                reader.close()

    @cached_property
    def _latents(self) -> CacheReader:
        return self._reader(self.facts.latents_folder)

    @cached_property
    def _texts(self) -> CacheReader:
        return self._reader(self.facts.text_folder)

    def _reader(self, folder: str) -> CacheReader:
        local_dir = Path(self.local_dir) if self.local_dir else default_local_folder()
        return CacheReader(open_storage(self.facts.cache_url), folder, local_dir, self._max_bytes)

    @property
    def _max_bytes(self) -> int:
        return int(self.facts.data.local_cache_gib * GIB)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _OPENED}


def load_dataset(plan: CachePlan, *, local_dir: str | None = None) -> Dataset:
    """The data set of a plan whose items are done.

    Images that failed while they were encoded are now among the bad.

    Raises:
        DataError: entries are missing, or more than `data.max_bad` are bad.
    """
    facts = plan.facts
    cache = open_storage(facts.cache_url)
    index = CacheIndex(cache, facts.latents_folder)
    live = facts.data.pictures_live
    cached = np.ones(len(plan.rows), np.bool_) if live else _cached(index, plan.rows.latents_keys)
    held = _cached(index, plan.held_out.latents_keys)
    absent = [*plan.rows.take(~cached), *plan.held_out.take(~held)]
    bad = sorted([*plan.bad, *_why_absent(plan, absent)], key=lambda one: (one.set, one.key))
    rows, held_out = plan.rows.take(cached), plan.held_out.take(held)
    _check_texts(cache, facts, [held_out] if facts.data.texts_live else [rows, held_out])
    if absent:
        write_quarantine(cache, facts.folders, bad)
        if any(options.is_reg for options in facts.sets):
            raise BalanceChanged(
                f"{len(absent)} images turned out bad while they were encoded, so the "
                "regularisation images have another balance to keep. Run the same command again."
            )
    check_bad_share(bad, plan.images, facts.data, cache.url)
    others = Dataset(held_out, (), facts, local_dir) if len(held_out) else None
    return Dataset(rows, tuple(bad), facts, local_dir, others)


def prepare_and_encode(
    data: DataOptions,
    sets: Sequence[SetOptions],
    cache_url: str,
    *,
    latents_facts: dict[str, Any],
    text_facts: dict[str, Any],
    make_encoder: Callable[[], Encoder],
    rehash: bool = False,
    extra_captions: Sequence[str] = (),
    image_batch: int = 1,
    local_dir: str | None = None,
    on_item: Callable[[WorkItem, ItemReport], None] = lambda item, report: None,
) -> Dataset:
    """Bring the cache up to date in this process, and load the data set.

    Args:
        make_encoder: called only when something is to be encoded.
        on_item: told after each work item, for progress.
    """
    plan = prepare(
        data,
        sets,
        cache_url,
        latents_facts=latents_facts,
        text_facts=text_facts,
        rehash=rehash,
        extra_captions=extra_captions,
    )
    encoder = make_encoder() if plan.items else None
    for item in plan.items if encoder else ():
        assert encoder is not None
        on_item(item, run_item(plan.facts, item, encoder, image_batch=image_batch))
    return load_dataset(plan, local_dir=local_dir)


# What a data set has opened, and leaves behind when it is sent to another process.
_OPENED = ("_latents", "_texts", "_filling")


def _names(keys: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Rows' names (N, V, 16) as one array of N times V."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").ravel()


def _cached(index: CacheIndex, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Of rows' names (N, V, 16): which rows have all of them in the cache."""
    known = index.contains(_names(keys)).reshape(keys.shape[:2])
    whole: NDArray[np.bool_] = np.asarray(known.all(axis=1))
    return whole


def _check_texts(cache: Any, facts: PlanFacts, sides: Sequence[Rows]) -> None:
    index = CacheIndex(cache, facts.text_folder)
    lacking = sum(int((~_cached(index, rows.text_keys)).sum()) for rows in sides)
    empty = "" if index.contains([text_key("")])[0] else " and the empty one"
    if lacking or empty:
        raise DataError(
            f"{cache.url}: the captions of {lacking} images{empty} are not in the cache. Run "
            "`raylora cache` with the same job to make them."
        )


def _why_absent(plan: CachePlan, absent: Sequence[Row]) -> list[BadSample]:
    """The reasons why rows have no latents, as the work items remembered them."""
    facts = plan.facts
    cache = open_storage(facts.cache_url)
    reasons: dict[int, str] = {}
    for number in sorted({row.set for row in absent}):
        source = PictureSource(facts.sets[number], cache).storage
        memory = SourceMemory(
            cache, facts.memory_folders[number], judges=(decoder_name(), facts.latents_folder)
        )
        memory.load()
        of_set = [index for index, row in enumerate(absent) if row.set == number]
        known = memory.reasons([source.entry(absent[index].key) for index in of_set])
        reasons |= {index: reason for index, reason in zip(of_set, known, strict=True) if reason}
    # What several sets have is encoded once, and remembered in the folder of one of them.
    shared = {key: reasons[index] for index in reasons for key in absent[index].latents_keys}
    found: list[BadSample] = []
    for index, row in enumerate(absent):
        reason = reasons.get(index) or next(
            (shared[key] for key in row.latents_keys if key in shared), None
        )
        if reason is None:
            raise DataError(
                f"{row.key}: its latents are not in the cache {facts.cache_url}, or it changed "
                "while they were made. Run the same command again."
            )
        found.append(BadSample(row.key, reason, row.set))
    return found
