"""Filling the cache: batches that fit, one model at a time, and a budget that is kept."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import ROOT, small_job

from raylora.base.errors import MemoryPlanError
from raylora.check import check_job
from raylora.components.vae import load_vae
from raylora.data.dataset import Dataset
from raylora.data.plan import WorkItem
from raylora.encoding import MOST_ENCODED, Encoding, image_batch
from raylora.job import Job
from raylora.local import cache_here
from raylora.memory.options import MemoryOptions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOLDOUT = str(ROOT / "jobs/quickstart/demo-data/holdout")
ITEM = WorkItem("latents", bucket=(64, 32))


def batch(free: float, device: torch.device = CUDA, item: WorkItem = ITEM, **words: Any) -> int:
    return image_batch(MemoryOptions(**words), item, device, 10, free)


def test_as_many_pictures_are_encoded_together_as_are_free():
    picture = 64 * 32 * 10
    assert [batch(n * picture) for n in (0.5, 1, 2.9, 5, 100)] == [1, 1, 2, 5, MOST_ENCODED]
    assert batch(-1) == 1
    assert batch(100 * picture, encode_batch=3) == 3
    assert batch(0, encode_batch=3) == 3
    assert batch(100 * picture, item=WorkItem("text")) == 1


@pytest.mark.parametrize(("asked", "found"), [(None, 1), (5, 5)])
def test_on_a_cpu_pictures_are_encoded_one_by_one_unless_asked(asked: int | None, found: int):
    assert batch(1e12, CPU, encode_batch=asked) == found


def job(store: Path, **more: Any) -> Job:
    words = {"data__folder": HOLDOUT, "data__cache": str(store / "cache"), **more}
    return small_job(str(store), **words)


def tensors(dataset: Dataset) -> list[dict[str, Any]]:
    return [dict(one) for one in dataset.fetch(list(dataset.rows))]


def peak_within(given: Job) -> int:
    """Fill a job's cache within its budget; the most that was held."""
    checked = check_job(given)
    encoding = Encoding(given, checked.family, CPU)
    assert encoding._budget is not None
    for plan in checked.plans:
        for item in plan.items:
            encoding.run(plan.facts, item)
    encoding.close()
    return encoding._budget.tracker.peak_bytes


@pytest.mark.slow
def test_a_cache_filled_within_a_budget_is_the_same_cache(tmp_path: Path):
    checked = check_job(job(tmp_path / "plain"))
    expected, family = tensors(cache_here(checked).training), checked.family
    text_bytes, vae_bytes = (
        sum(weight.nbytes for weight in model.parameters())
        for model in (
            family.load_text_encoder("text_encoder", dtype=torch.float32, device=CPU),
            load_vae(family.base, dtype=torch.float32, device=CPU),
        )
    )
    budgets: list[float] = [1.0]
    for name in ("wide", "tight"):
        words = {"memory__budget_gib": budgets[-1], "memory__reserve_gib": 0}
        peak = peak_within(job(tmp_path / name, **words))
        assert text_bytes < peak <= budgets[-1] * 2**30
        budgets.append(peak / 2**30)
        again = check_job(job(tmp_path / name))
        assert [len(plan.items) for plan in again.plans] == [0]
        for one, other in zip(tensors(cache_here(again).training), expected, strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[word], other[word]) for word in one)
    # The VAE's weights leave nothing for its work.
    words = {"memory__budget_gib": vae_bytes / 2**30, "memory__reserve_gib": 0}
    with pytest.raises(MemoryPlanError, match="Out of memory at encoding pictures of"):
        peak_within(job(tmp_path / "none", **words))


@pytest.mark.slow
def test_pictures_come_before_captions_so_that_each_model_is_loaded_once(
    tmp_path: Path, monkeypatch: Any
):
    kinds: list[str] = []
    run = Encoding.run

    def noted(self: Encoding, facts: Any, item: WorkItem) -> Any:
        kinds.append(item.kind)
        return run(self, facts, item)

    monkeypatch.setattr(Encoding, "run", noted)
    held_out = str(ROOT / "jobs/quickstart/demo-data/train")
    cache_here(check_job(job(tmp_path, validation__folder=held_out)))
    assert len(kinds) >= 4
    assert kinds == ["latents"] * kinds.count("latents") + ["text"] * kinds.count("text")


def test_a_budget_that_holds_no_picture_is_told_in_words(tmp_path: Path):
    with pytest.raises(MemoryPlanError, match="encoding pictures of") as caught:
        cache_here(check_job(job(tmp_path, memory__budget_gib=1e-4, memory__reserve_gib=0.0)))
    assert "memory.budget_gib" in str(caught.value)


@pytest.mark.slow  # imports Ray
def test_an_actor_whose_device_holds_no_picture_says_so_in_a_row(tmp_path: Path):
    from raylora.on_ray.cache import _Encode, _Work

    given = job(tmp_path, memory__budget_gib=1e-4, memory__reserve_gib=0.0)
    (plan, *_) = check_job(given).plans
    actor = _Encode()
    for item in plan.items[:2]:
        work = _Work(plan.facts, item, given.plain(), str(ROOT))
        told = actor({"work": pickle.dumps(work)})
        assert told["encoded"] == 0
        assert "encoding pictures of" in told["problem"]
