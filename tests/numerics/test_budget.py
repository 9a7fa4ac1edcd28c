"""On a CPU with a budget training stays inside it, and the LoRA is the plain run's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import random_folder
from children import together
from small import ROOT, final_state, open_run, small_job
from torch import Tensor

from raylora.assemble import claim, make_run, open_store
from raylora.base.errors import MemoryPlanError
from raylora.base.segments import read_segments
from raylora.base.storage import open_storage
from raylora.base.units import GIB
from raylora.check import check_job
from raylora.job import Job, load_job, with_overrides
from raylora.local import cache_here
from raylora.memory.setting import Setting
from raylora.training.loop import Run, run_training
from raylora.training.reduce import Distributed


def job_of(family: str, store: Path, **more: Any) -> Job:
    """Two steps on a tiny base; exact sums, so that micro-batches round nothing."""
    given = {
        "data__folder": str(ROOT / "jobs/quickstart/demo-data/holdout"),
        "data__cache": str(store.parent / "cache"),
        "training__steps": 2,
        "training__images_per_step": 2,
        "training__sums": "exact",
        **more,
    }
    if family == "quickstart":
        return small_job(str(store), **given)
    bare = {
        "family.weights": str(random_folder(family)),
        "store": str(store),
        "training.save_every_steps": None,
        "validation.folder": None,
        "preview.prompts": [],
        "fleet.workers": 1,
    }
    words = {word.replace("__", "."): value for word, value in given.items()}
    return with_overrides(load_job(ROOT / "jobs/smoke" / f"{family}.yaml"), {**bare, **words})


def trained(job: Job) -> Run:
    run = open_run(job, report=True)
    try:
        run_training(run)
    finally:
        run.close()
    return run


def within(bytes_: int) -> dict[str, Any]:
    return {"memory__budget_gib": bytes_ / GIB, "memory__reserve_gib": 0}


def events(job: Job, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_segments(open_store(job), "events") if row["event"] == kind]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "parts"),
    [("quickstart", (0.6,)), ("sdxl", (0.6,)), ("flux1", (0.8,)), ("sd15", (0.7,))],
)
def test_below_the_plain_peak_the_lora_is_bit_equal(
    tmp_path: Path, family: str, parts: tuple[float, ...]
):
    plain = job_of(family, tmp_path, name="plain")
    trained(plain)
    roomy = job_of(family, tmp_path, name="roomy", **within(GIB))
    peak = trained(roomy).memory.peak_bytes
    assert same(final_state(roomy), final_state(plain))
    for part in parts:
        job = job_of(family, tmp_path, name=f"at-{part}", **within(int(peak * part)))
        run = trained(job)
        assert 0 < run.memory.peak_bytes <= int(peak * part) < peak
        assert same(final_state(job), final_state(plain)), run.parts.fitting.setting
        (planned,) = events(job, "plan")
        assert planned["observed_peak_bytes"] > 0
        assert planned["setting"] != events(roomy, "plan")[0]["setting"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "far"),
    # Relative to what two steps move: the gradients are of a model whose weights are off by their
    # rounding, 2^-9 of a row's largest in int8, 2^-4 of each number in e4m3.
    [("int8", 0.3), ("fp8", 0.6)],
)
def test_a_base_in_fewer_bits_learns_nearly_the_same(tmp_path: Path, base: str, far: float):
    plain = job_of("quickstart", tmp_path, name="plain", training__steps=2)
    run = open_run(plain)
    before = run.parts.adapter.values.detach().clone()
    run.close()
    trained(plain)
    peak = trained(job_of("quickstart", tmp_path, name="roomy", **within(GIB))).memory.peak_bytes
    words = {**within(int(0.8 * peak)), "memory__base": base}
    small = job_of("quickstart", tmp_path, name=base, **words)
    assert trained(small).memory.peak_bytes <= int(0.8 * peak)
    one, other = (final_state(job)["values"] for job in (plain, small))
    assert 0 < (one - other).norm() <= far * (one - before).norm()


@pytest.mark.slow
def test_a_trial_changes_no_bit_of_a_run(tmp_path: Path):
    tried = job_of("quickstart", tmp_path, name="tried", ema__decay=0.9, **within(GIB))
    assert trained(tried).trial
    untried = job_of("quickstart", tmp_path, name="untried", ema__decay=0.9, **within(GIB))
    run = open_run(untried, report=True)
    run.trial = None
    run_training(run)
    run.close()
    assert same(final_state(tried), final_state(untried))
    assert not events(untried, "plan")


@pytest.mark.slow
@pytest.mark.parametrize("states", [False, True])
def test_a_resumed_run_stays_inside_its_budget_too(tmp_path: Path, states: bool):
    plain = job_of("quickstart", tmp_path, name="plain")
    peak = trained(job_of("quickstart", tmp_path, name="roomy", **within(GIB))).memory.peak_bytes
    trained(plain)
    words = {**within(int(0.75 * peak)), "memory__host_states": states}
    job = job_of("quickstart", tmp_path, name="broken-off", **words)
    begun = open_run(job, report=True)
    begun.course = replace(begun.course, total_steps=1)
    run_training(begun)
    begun.close()
    resumed = trained(job)
    assert events(job, "resumed")[0]["step"] == 1
    assert resumed.memory.peak_bytes <= int(0.75 * peak)
    assert same(final_state(job), final_state(plain))


@pytest.mark.slow
def test_what_a_trial_found_is_kept_for_the_next_run_of_the_shape(tmp_path: Path):
    job = job_of("quickstart", tmp_path, name="first", **within(GIB))
    first = trained(job)
    ((key, held),) = (
        (entry.key, json.loads(open_storage(job.store).read(entry.key)))
        for entry in open_storage(job.store).entries("plans")
    )
    assert held["setting"] == first.parts.fitting.setting.plain()
    assert held["observed"]["peak_bytes"] == events(job, "plan")[0]["peak_bytes"]
    other = {"setting": Setting(checkpointing="alternate", micro_batch=1).plain()}
    open_storage(job.store).write(key, json.dumps(held | other).encode())
    for name, more, wanted in (
        ("second", {}, "alternate"),
        ("another shape", {"network__rank": 4}, "none"),
    ):
        run = open_run(job_of("quickstart", tmp_path, name=name[:6], **more, **within(GIB)))
        assert run.parts.fitting.setting.checkpointing == wanted
        run.close()


@pytest.mark.slow
def test_a_budget_that_nothing_fits_is_one_sentence(tmp_path: Path):
    open_run(job_of("quickstart", tmp_path, name="roomy")).close()  # what is cached is cached
    with pytest.raises(MemoryPlanError, match="CPU") as caught:
        open_run(job_of("quickstart", tmp_path, name="tight", **within(2**20)))
    assert "\n" not in str(caught.value)


def train_member(rank: int, job: Job, budgets: tuple[int, int]) -> tuple[dict[str, Any], int]:
    torch.set_num_threads(1)
    checked = check_job(job)
    storage, _ = claim(job)
    datasets, group = cache_here(checked), Distributed()
    mine = with_overrides(job, {"memory.budget_gib": budgets[rank] / GIB})
    device = torch.device("cpu")
    run = make_run(mine, checked.family, datasets, storage, group, device, prove=False)
    try:
        run_training(run)
    finally:
        run.close()
    return run.parts.fitting.setting.plain(), run.memory.peak_bytes


@pytest.mark.slow
def test_of_two_workers_the_one_with_less_memory_does_more(tmp_path: Path):
    peak = trained(job_of("quickstart", tmp_path, name="roomy", **within(GIB))).memory.peak_bytes
    plain = job_of("quickstart", tmp_path, name="plain")
    trained(plain)
    fleet = {"fleet__workers": 2, "fleet__shares": (1.0, 1.0)}
    job = job_of("quickstart", tmp_path, name="two", **fleet, **within(GIB))
    budgets = (GIB, int(0.7 * peak))
    (wide, wide_peak), (tight, tight_peak) = together(2, train_member, job, budgets)
    assert wide["streamed"] == 0
    assert wide["checkpointing"] == "none"
    assert tight != wide
    assert tight_peak <= budgets[1] < wide_peak
    assert same(final_state(job), final_state(plain))
    assert {row.get("worker", 0) for row in events(job, "plan")} == {0, 1}
