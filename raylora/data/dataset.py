"""A data set ready for training: rows, and their cached tensors on request.

The road with Ray is `prepare`, `run_item` on any machine, `load_dataset`; without it,
`prepare_and_encode` does the three in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from raylora.base.encoder import Encoder
from raylora.base.errors import DataError
from raylora.base.storage import open_storage
from raylora.base.units import GIB
from raylora.data.cache_index import CacheIndex
from raylora.data.cache_read import CacheReader
from raylora.data.decode import decoder_name
from raylora.data.encode import ItemReport, run_item
from raylora.data.local_cache import default_local_folder
from raylora.data.plan import CachePlan, PlanFacts, WorkItem, prepare
from raylora.data.quarantine import check_bad_share, write_quarantine
from raylora.data.recipe import text_key
from raylora.data.remembered import Seen, SourceMemory
from raylora.data.rows import BadSample, Row
from raylora.data.source import DataOptions

__all__ = [
    "BadSample",
    "CachePlan",
    "Dataset",
    "Encoder",
    "ItemReport",
    "PlanFacts",
    "Row",
    "WorkItem",
    "load_dataset",
    "prepare",
    "prepare_and_encode",
    "run_item",
]


@dataclass(frozen=True)
class Dataset:
    """Rows whose tensors are all cached; pickles without them, opens the cache where it lands."""

    rows: tuple[Row, ...]
    """Sorted by key."""
    bad: tuple[BadSample, ...]
    facts: PlanFacts
    local_dir: str | None = None
    """Folder of the local cache; None is `default_local_folder` of the machine it lands on."""

    def fetch(self, rows: Sequence[Row]) -> list[dict[str, NDArray[Any]]]:
        """The tensors of each row, latents and text together, as read-only arrays."""
        latents = self._latents.get([row.latents_key for row in rows])
        texts = self._texts.get([row.text_key for row in rows])
        return [{**text, **image} for image, text in zip(latents, texts, strict=True)]

    def fetch_texts(self, captions: Sequence[str]) -> list[dict[str, NDArray[Any]]]:
        """The text tensors of captions that were cached: "" always, and those of the data set."""
        return self._texts.get([text_key(caption) for caption in captions])

    def close(self) -> None:
        """Let go of files and threads; the next fetch opens them again."""
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
        max_bytes = int(self.facts.data.local_cache_gib * GIB)
        return CacheReader(open_storage(self.facts.cache_url), folder, local_dir, max_bytes)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_latents", "_texts")}


def load_dataset(plan: CachePlan, *, local_dir: str | None = None) -> Dataset:
    """The data set of a plan whose items are done.

    Images that failed while they were encoded are now among the bad.

    Raises:
        DataError: entries are missing, or more than `data.max_bad` are bad.
    """
    facts = plan.facts
    cache = open_storage(facts.cache_url)
    index = CacheIndex(cache, facts.latents_folder)
    cached = index.contains([row.latents_key for row in plan.rows])
    rows = tuple(row for row, here in zip(plan.rows, cached, strict=True) if here)
    absent = [row for row, here in zip(plan.rows, cached, strict=True) if not here]
    bad = tuple(sorted([*plan.bad, *_why_absent(plan, absent)], key=lambda one: one.key))
    texts = {row.text_key for row in rows} | {text_key("")}
    lacking = CacheIndex(cache, facts.text_folder).contains(list(texts))
    if not lacking.all():
        raise DataError(
            f"{cache.url}: {int((~lacking).sum())} of {len(texts)} texts are not in the cache. "
            "Run `raylora cache` with the same job to make them."
        )
    if absent:
        write_quarantine(cache, open_storage(facts.data.folder).url, bad)
    check_bad_share(bad, len(plan.rows) + len(plan.bad), facts.data, cache.url)
    return Dataset(rows, bad, facts, local_dir)


def prepare_and_encode(
    data: DataOptions,
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


def _why_absent(plan: CachePlan, absent: Sequence[Row]) -> list[BadSample]:
    """The reasons why rows have no latents, as the work items remembered them."""
    if not absent:
        return []
    facts = plan.facts
    source = open_storage(facts.data.folder)
    memory = SourceMemory(
        open_storage(facts.cache_url),
        facts.sources_folder,
        judges=(decoder_name(), facts.latents_folder),
    )
    memory.load()
    found: list[BadSample] = []
    for row in absent:
        entry = source.entry(row.key)
        seen: Seen | None = memory.get(entry) if entry else None
        if seen is None or seen.bad is None:
            raise DataError(
                f"{row.key}: its latents are not in the cache {facts.cache_url}, or it changed "
                "while they were made. Run the same command again."
            )
        found.append(BadSample(row.key, seen.bad))
    return found
