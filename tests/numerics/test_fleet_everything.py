"""The same LoRA from any fleet with all that may be asked for, and after losing a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from children import Child, free_port, together
from children import _in_group as in_group
from small import ROOT, final_state, first_values, small_job
from torch import Tensor

from raylora.assemble import claim, make_run, open_store
from raylora.check import check_job
from raylora.job import Job
from raylora.local import cache_here
from raylora.training.checkpoint import checkpoint_steps, read_checkpoint
from raylora.training.loop import Run, run_training
from raylora.training.loss_scale import LossScale
from raylora.training.reduce import Alone, Distributed
from raylora.training.report import read_metrics

STEPS, OVERFLOWS, BROKEN, LOST = 8, 1, 3, 7
FIRST, LAST = 8.0, 2.0
"""Loss scale, before what overflows and after."""
HOLDOUT = ROOT / "jobs/quickstart/demo-data/holdout"


def everything(store: Path, **more: object) -> Job:
    """Text encoder with LoRA+ and a stop, dropout, cap, average, noise, sets, best and patience."""
    kept = store.parent / "kept"
    if not kept.exists():
        kept.mkdir()
        for file in HOLDOUT.glob("[a-c]*"):
            (kept / file.name).write_bytes(file.read_bytes())
    given: dict[str, Any] = {
        "data__folder": None,
        "data__sets": [
            {"folder": str(HOLDOUT)},
            {"folder": str(kept), "is_reg": True, "output_preservation": True},
        ],
        "data__cache": str(store.parent / "cache"),
        "data__prior_loss_weight": 0.5,
        "network": {"train": "both", "rank": 4, "max_norm": 0.2}
        | {"dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1},
        "optimizer": {"learning_rate": 3e-3, "lora_plus_ratio": 4.0, "text_encoder_stop": 0.6},
        "schedule__warmup_steps": 0,
        "noise": {"offset": 0.1, "input_perturbation": 0.1, "input_perturbation_random": True},
        "ema__decay": 0.9,
        "validation": {"folder": str(kept), "every_steps": 4, "patience": 9, "timesteps": [400]},
        "training__steps": STEPS,
        "training__images_per_step": 3,
        "training__save_every_steps": 3,
        "training__keep_best": True,
    }
    return small_job(str(store), **{**given, **more})


def spoil(run: Run, *, lost: bool) -> None:
    """One step overflows until its scale is small, one cannot be mended, and one is never done."""
    parts = run.parts
    # On a CPU float16 is slow, and its scale works in any precision.
    parts.loss_scale = LossScale(on=parts.skip_broken)
    parts.loss_scale.factor = FIRST if parts.skip_broken else 1.0
    take, predict, now = parts.loader.take, parts.predict, [0]

    def noted(step: int) -> Any:
        now[0] = step
        if lost and step == LOST:
            raise RuntimeError("lost")
        return take(step)

    def spoilt(*given: Any) -> Tensor:
        found = predict(*given)
        # Only one of a fleet sees it, and it is not the first.
        mine = parts.group.rank == parts.group.size - 1 and torch.is_grad_enabled()
        if mine and now[0] == OVERFLOWS and parts.loss_scale.factor > LAST:
            return found * torch.inf
        return found * torch.nan if mine and now[0] == BROKEN and parts.skip_broken else found

    parts.loader.take = noted  # type: ignore[method-assign]
    parts.predict = spoilt


def train_one(job: Job, rank: int = 0, group: Any = None, *, lost: bool = False) -> float:
    """Train as a worker; its loss scale at the end."""
    torch.set_num_threads(1)
    checked = check_job(job)
    storage, _ = claim(job)
    group = group or Alone()
    device = torch.device("cpu")
    run = make_run(job, checked.family, cache_here(checked), storage, group, device, prove=False)
    spoil(run, lost=lost)
    try:
        run_training(run)
    finally:
        run.close()
    return run.parts.loss_scale.factor


def train_member(rank: int, job: Job, lost: bool = False) -> float:
    return train_one(job, rank, Distributed(), lost=lost and rank == 1)


def facts_of(job: Job) -> dict[str, Any]:
    storage = open_store(job)
    return read_checkpoint(storage, checkpoint_steps(storage)[-1]).facts


def lose_a_worker(job: Job) -> None:
    port = free_port()
    members = [Child(in_group, rank, 2, port, train_member, (job, True)) for rank in (0, 1)]
    with pytest.raises(AssertionError, match="lost"):
        members[1].result()
    members[0].kill()
    assert checkpoint_steps(open_store(job))[-1] == LOST // 3 * 3


@pytest.mark.slow
def test_two_workers_one_of_them_lost_train_the_lora_of_one_whatever_is_asked_for(tmp_path: Path):
    given = {"training__sums": "exact", "training__on_nan": "skip"}
    one = everything(tmp_path / "one", **given)
    alone = Child(train_one, one)
    assert alone.result() == LAST
    fleet = {"fleet__workers": 2, "fleet__shares": (2.0, 1.0)}
    two = everything(tmp_path / "two", **given, **fleet)
    lose_a_worker(two)
    assert together(2, train_member, two) == [LAST, LAST]
    expected, found = final_state(one), final_state(two)
    assert expected.keys() == found.keys()
    assert "ema" in found
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    facts = [facts_of(job) for job in (one, two)]
    assert facts[0]["judge"]["best"]["step"] is not None
    for word in ("judge", "loss_scale", "optimizer", "keep"):
        assert facts[0][word] == facts[1][word], word
    rows = [read_metrics(open_store(job)) for job in (one, two)]
    told = [
        [{word: row.get(word) for word in ("done", "validation", "skipped", "rates", "extra")}]
        for held in rows
        for row in held
    ]
    assert told[: len(rows[0])] == told[len(rows[0]) :]
    assert [row["done"] - 1 for row in rows[0] if row.get("skipped")] == [BROKEN]
    assert sum(row.get("extra", {}).get("capped_layers", 0) for row in rows[0]) > 0
    stopped = [row["rates"]["textencoder"] == 0 for row in rows[0] if "rates" in row]
    assert stopped == [step >= 5 for step in range(STEPS)]


@pytest.mark.slow
def test_fast_sums_of_two_workers_agree_to_rounding_whatever_is_asked_for(tmp_path: Path):
    given = {"training__precision": "fp64"}
    one = everything(tmp_path / "one", **given)
    alone = Child(train_one, one)
    two = everything(
        tmp_path / "two",
        **given,
        fleet__workers=2,
        fleet__shares=(1.0, 2.0),
        memory__max_micro_batch=2,
    )
    alone.result()
    together(2, train_member, two)
    expected, found, start = final_state(one), final_state(two), first_values(two, Alone())
    for name in ("values", "ema"):
        moved = (expected[name] - start).norm()
        # float64 has 53 bits: 1e-16 a sum, through eight steps of Adam
        assert (found[name] - expected[name]).norm() <= 1e-10 * moved
        assert moved > 0.1
