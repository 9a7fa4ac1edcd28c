"""Whatever moves the adapter, a run that stopped half-way ends on the bits of the unbroken one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import ROOT, open_run, small_job
from torch import Tensor

from raylora.assemble import open_store
from raylora.base.storage import Storage
from raylora.job import Job
from raylora.optim.kinds import KINDS
from raylora.optim.optimizers import OptimizerOptions, optimizer_problem
from raylora.optim.schedules import WORDS
from raylora.training.checkpoint import read_checkpoint
from raylora.training.loop import run_training
from raylora.training.report import read_metrics

STEPS = 20
RUNS_HERE = [
    name for name in KINDS if optimizer_problem(OptimizerOptions(name=name), "cpu") is None
]
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"warmup_steps": 3, "cycles": 2},
    "polynomial": {"warmup_steps": 0.1, "power": 2.0},
    "inverse_sqrt": {"warmup_steps": 3},
    "cosine_with_min_lr": {"min_ratio": 0.1},
    "warmup_stable_decay": {"warmup_steps": 3, "decay_steps": 0.4},
    "piecewise_constant": {"step_rules": "1:5,0.5:15,0.1"},
    "torch.optim.lr_scheduler:ExponentialLR": {"args": {"gamma": 0.9}},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "text encoder, LoRA+, stopped": {
        "network__train": "both",
        "optimizer__lora_plus_ratio": 4.0,
        "optimizer__text_encoder_rate": 1e-3,
        "optimizer__text_encoder_stop": 0.6,
    },
    "dropout, cap and average": {
        "network__dropout": 0.1,
        "network__rank_dropout": 0.1,
        "network__module_dropout": 0.1,
        "network__max_norm": 0.5,
        "ema__decay": 0.9,
    },
    "LoCon, by block, checkpointed": {
        "network": {"kind": "locon", "rank": 4, "conv_rank": 2, "conv_alpha": 1.0},
        "optimizer__block_rates": {"down": "cosine", "up": "linear+.25"},
        "memory__checkpointing": "all",
    },
    "fp16": {"training__precision": "fp16"},
    "every noise": {
        "noise": {"offset": 0.1, "offset_random": True, "adaptive_scale": 0.05}
        | {"input_perturbation": 0.1, "input_perturbation_random": True, "zero_terminal_snr": True},
        "loss": {"name": "huber", "weight": {"name": "min_snr"}, "scale_v_pred_like_noise": True},
    },
    "away from the images": {"optimizer__learning_rate": -1e-4},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job_of(store: Path, cache: str, given: dict[str, Any]) -> Job:
    bare = {
        "data__folder": str(ROOT / "jobs/quickstart/demo-data/holdout"),
        "data__cache": cache,
        "training__steps": STEPS,
        "training__images_per_step": 1,
        "training__save_every_steps": STEPS // 2,
        "network__rank": 4,
        "schedule__warmup_steps": 0,
    }
    return small_job(str(store), **{**bare, **given})


def finished(job: Job) -> tuple[dict[str, Tensor], list[float]]:
    """Train from the newest checkpoint to the end: its state, and the losses of all steps."""
    run = open_run(job, report=True)
    try:
        run_training(run)
    finally:
        run.close()
    storage = open_store(job)
    losses = [row["loss"] for row in read_metrics(storage) if "loss" in row]
    return read_checkpoint(storage, STEPS).tensors, losses


def forget_the_end(storage: Storage) -> None:
    for entry in storage.entries(f"checkpoints/{STEPS:06d}"):
        storage.delete(entry.key)


def is_resumed_exactly(job: Job) -> dict[str, Tensor]:
    unbroken, losses = finished(job)
    start = read_checkpoint(open_store(job), STEPS // 2).tensors["values"]
    assert not torch.equal(unbroken["values"], start), "the second half moved nothing"
    forget_the_end(open_store(job))
    resumed, again = finished(job)
    assert again == losses
    assert len(losses) == STEPS
    assert resumed.keys() == unbroken.keys()
    for name, tensor in unbroken.items():
        assert torch.equal(resumed[name], tensor), name
    return unbroken


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RUNS_HERE, "torch.optim:NAdam"])
def test_every_optimizer_goes_on_as_if_it_had_not_stopped(name: str, tmp_path: Path, cache: str):
    given = {"optimizer": {"name": name}, "schedule": {"name": "constant"}}
    is_resumed_exactly(job_of(tmp_path, cache, given))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WORDS, "torch.optim.lr_scheduler:ExponentialLR"])
def test_every_schedule_goes_on_as_if_it_had_not_stopped(name: str, tmp_path: Path, cache: str):
    given: dict[str, Any] = {"schedule": {"name": name, **SCHEDULES.get(name, {})}}
    if name == "adafactor":
        given["optimizer"] = {"name": "adafactor"}
    is_resumed_exactly(job_of(tmp_path, cache, given))


@pytest.mark.slow
@pytest.mark.parametrize("given", TOGETHER.values(), ids=list(TOGETHER))
def test_what_goes_with_them_goes_on_too(given: dict[str, Any], tmp_path: Path, cache: str):
    is_resumed_exactly(job_of(tmp_path, cache, given))
