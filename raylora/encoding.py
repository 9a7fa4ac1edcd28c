"""Encoding what the cache lacks: one model on the device at a time, in batches that fit."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from raylora.base.units import GIB
from raylora.components.cache_encoder import CacheEncoder
from raylora.components.vae import encoding_bytes
from raylora.data.encode import ItemReport, run_item
from raylora.data.plan import PlanFacts, WorkItem
from raylora.families import Family
from raylora.job import Job
from raylora.memory.budget import Budget
from raylora.memory.lending import free_on, lending_of
from raylora.memory.options import MemoryOptions
from raylora.training.fitting import told_in_words

MOST_ENCODED = 16
_ADVICE = (
    "Free the device of other programs, raise memory.budget_gib where it is set, choose a smaller "
    "data.resolution, or fill the cache on a larger device (`raylora cache`)."
)


class Encoding:
    """Does work items of a job's cache plans on one device; nothing is loaded before the first.

    Give it pictures first and captions then, or the other way round: where they alternate, so do
    the models.
    """

    def __init__(self, job: Job, family: Family, device: torch.device) -> None:
        self._options, self._family, self._device = job.memory, family, device
        limit = job.memory.budget_gib
        # A GPU's allocator knows its limit; a CPU is made to keep to one.
        limited = limit is not None and device.type == "cpu"
        self._budget = Budget(int((limit or 0) * GIB)) if limited else None
        tracker = self._budget.tracker if self._budget else None
        self._free = free_on(device, job.memory, tracker)
        self._lending = lending_of(family, job.memory, device, budget=tracker)
        self._encoder: CacheEncoder | None = None

    def run(self, facts: PlanFacts, item: WorkItem) -> ItemReport:
        """Encode an item's entries and leave them in the cache."""
        if self._encoder is None:
            self._encoder = self._family.load_encoder(device=self._device, lender=self._lending)
        batch = image_batch(self._options, item, self._device, self._pixel_bytes(), self._free())
        limit = self._budget.enforced() if self._budget else nullcontext()
        with limit, told_in_words(_where(item), _ADVICE):
            return run_item(facts, item, self._encoder, image_batch=batch)

    def close(self) -> None:
        """Leave the device."""
        self._lending.close()

    def _pixel_bytes(self) -> int:
        return encoding_bytes(self._family.base.config("vae")["block_out_channels"])


def _where(item: WorkItem) -> str:
    """For people."""
    if item.bucket is None:
        return "encoding captions"
    width, height = item.bucket
    return f"encoding pictures of {width}x{height}, one at a time"


def image_batch(
    options: MemoryOptions,
    item: WorkItem,
    device: torch.device,
    pixel_bytes: int,
    free_bytes: float,
) -> int:
    """How many pictures of a work item are encoded together on this device.

    Args:
        pixel_bytes: what the VAE takes for a pixel. Its kernels' own workspaces are not in it; out
            of memory halves the batch.
    """
    if options.encode_batch is not None:
        return options.encode_batch
    if device.type != "cuda" or item.bucket is None:
        return 1
    pixels = item.bucket[0] * item.bucket[1]
    return max(1, min(MOST_ENCODED, int(free_bytes // (pixel_bytes * pixels))))
