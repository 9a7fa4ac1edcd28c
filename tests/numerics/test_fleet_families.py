"""The same LoRA from any fleet, for families that are told more than a timestep and a caption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bases import random_folder
from children import Child, free_port, together
from children import _in_group as in_group
from small import ROOT, final_state

from raylora.assemble import claim, make_run, open_store
from raylora.check import check_job
from raylora.job import Job, load_job, with_overrides
from raylora.local import cache_here
from raylora.training.checkpoint import checkpoint_steps
from raylora.training.loop import run_training
from raylora.training.reduce import Alone, Distributed
from raylora.training.report import read_metrics

STEPS, SAVED, LOST = 5, 2, 3
JOBS: dict[str, dict[str, Any]] = {
    # Geometry of drawn crops, two text encoders, captions of two chunks, slices of ranks.
    "sdxl": {
        "family.max_tokens": 150,
        "data.fit": "crop",
        "data.random_crop": True,
        "data.flip_aug": True,
        "network": {"kind": "dylora", "rank": 4, "unit": 2, "train": "both", "dropout": 0.1},
    },
    # Timesteps of a flow shifted by each bucket's size, encoders left out, all three trained.
    "sd3": {
        "timesteps.shift": "resolution",
        "family.clip_l_dropout": 0.3,
        "family.clip_g_dropout": 0.3,
        "family.t5_dropout": 0.3,
        "network": {"kind": "lora", "rank": 4, "train": "both", "rank_dropout": 0.1}
        | {"text_encoders": ["text_encoder", "text_encoder_2", "text_encoder_3"]},
    },
}


def job_of(family: str, store: Path, more: dict[str, Any]) -> Job:
    given = {
        "family.weights": str(random_folder(family)),
        "store": str(store),
        "data.cache": str(store.parent / "cache"),
        "optimizer.learning_rate": 3e-3,
        "schedule.warmup_steps": 0,
        "validation.every_steps": STEPS,
        "preview.prompts": [],
        "training.steps": STEPS,
        "training.images_per_step": 3,
        "training.save_every_steps": SAVED,
        "training.sums": "exact",
        "export.naming": "kohya",
    }
    job = load_job(ROOT / "jobs" / "smoke" / f"{family}.yaml")
    return with_overrides(job, {**given, **JOBS[family], **more})


def train_one(job: Job, group: Any = None, *, lost: bool = False) -> None:
    """Train as a worker, or fail before the step that is lost."""
    torch.set_num_threads(1)
    checked = check_job(job)
    storage, _ = claim(job)
    group = group or Alone()
    device = torch.device("cpu")
    run = make_run(job, checked.family, cache_here(checked), storage, group, device, prove=False)
    take = run.parts.loader.take

    def taken(step: int) -> Any:
        if lost and step == LOST:
            raise RuntimeError("lost")
        return take(step)

    run.parts.loader.take = taken  # type: ignore[method-assign]
    try:
        run_training(run)
    finally:
        run.close()


def train_member(rank: int, job: Job, lost: bool = False) -> None:
    train_one(job, Distributed(), lost=lost and rank == 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", JOBS)
def test_two_workers_one_of_them_lost_train_the_lora_of_one(family: str, tmp_path: Path):
    one = job_of(family, tmp_path / "one", {})
    Child(train_one, one).result()
    fleet = {"fleet.workers": 2, "fleet.shares": (2.0, 1.0)}
    two = job_of(family, tmp_path / "two", fleet)
    port = free_port()
    members = [Child(in_group, rank, 2, port, train_member, (two, True)) for rank in (0, 1)]
    with pytest.raises(AssertionError, match="lost"):
        members[1].result()
    members[0].kill()
    assert checkpoint_steps(open_store(two)) == [SAVED]
    together(2, train_member, two)
    expected, found = final_state(one), final_state(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    words = ("done", "validation", "rates", "samples")
    rows = [read_metrics(open_store(job)) for job in (one, two)]
    first, second = ([[row.get(word) for word in words] for row in held] for held in rows)
    assert first == second
