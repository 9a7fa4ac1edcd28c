"""How held-out losses steer a run: its best is kept, it ends early, it is told that it overfits.

One icon is learned at far too high a rate, and two others are held out: they get worse at once.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from children import together
from safetensors.torch import load as load_tensors
from small import ROOT, MakeJob, open_run, train_small

from raylora.assemble import claim, finish, open_store
from raylora.base.errors import TrainingError
from raylora.base.segments import read_segments
from raylora.job import Job
from raylora.training.checkpoint import checkpoint_steps, read_facts
from raylora.training.loop import Outcome, Run, run_training
from raylora.training.reduce import Distributed, Group
from raylora.training.report import read_metrics

PATIENCE = 7


class Killed(Exception):
    """The process was gone."""


@pytest.fixture
def make_spoiled(make_job: MakeJob, one_icon: str, tmp_path: Path) -> MakeJob:
    """A job that overfits within a few steps and ends early."""
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    icons = sorted((ROOT / "jobs/quickstart/demo-data/train").glob("*.png"))[:2]
    for file in [icon for png in icons for icon in png.parent.glob(f"{png.stem}.*")]:
        (held_out / file.name).write_bytes(file.read_bytes())

    def make(**more: Any) -> Job:
        given = {
            "data__folder": one_icon,
            "validation__folder": str(held_out),
            "validation__every_steps": 1,
            "validation__timesteps": [150, 700],
            "validation__training_images": 4,
            "validation__patience": PATIENCE,
            "training__steps": 30,
            "training__images_per_step": 2,
            "training__save_every_steps": 2,
            "training__keep_best": True,
            "training__keep_last": 1,
            "optimizer__learning_rate": 1e-2,
            "schedule__name": "constant",
            "schedule__warmup_steps": 0,
            "log__every_steps": 1,
        }
        return make_job(**{**given, **more})

    return make


def open_whole(job: Job, group: Group | None = None) -> Run:
    torch.set_num_threads(1)
    return open_run(job, group, report=True)


def go(job: Job, group: Group | None = None) -> Outcome:
    run = open_whole(job, group)
    try:
        return run_training(run)
    finally:
        run.close()


def kill_after_measuring(job: Job, step: int) -> None:
    run = open_whole(job)
    assert run.reporter

    def kill(row: dict[str, Any]) -> None:
        if row.get("done") == step and "validation" in row:
            raise Killed

    run.reporter.sinks.append(kill)
    with pytest.raises(Killed):
        run_training(run)
    run.close()


def stop_after(job: Job, step: int) -> Outcome:
    """SIGTERM comes while the step before is computed: the next is the last."""
    run = open_whole(job)
    seen, predict = [0], run.parts.predict

    def ask(*given: Any) -> Any:
        seen[0] += torch.is_grad_enabled()
        if seen[0] == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(*given)

    run.parts.predict = ask
    try:
        return run_training(run)
    finally:
        run.close()


def ending(job: Job) -> dict[str, Any]:
    """All that is left of a run that must not depend on whether it was stopped."""
    storage = open_store(job)
    result = finish(job, storage)
    said: list[dict[str, Any]] = []
    for event in read_segments(storage, "events"):
        facts = {k: v for k, v in event.items() if k not in ("time", "attempt")}
        if event["event"] in ("overfitting", "early stop") and facts not in said:
            said.append(facts)  # one that was killed may say it again
    named = ("name", "files", "adapter_bytes")  # the name is in the file's header
    return {
        "result": {k: v for k, v in result.items() if k not in named},
        "steps": checkpoint_steps(storage),
        "facts": read_facts(storage, result["steps"])["judge"],
        "said": said,
        "measured": [
            {k: v for k, v in row.items() if k != "attempt"}
            for row in read_metrics(storage)
            if "validation" in row
        ],
        "files": {
            (word, name): tensor.tolist()
            for word in ("adapter", "best")
            for name, tensor in load_tensors(storage.read(result["files"][word])).items()
        },
    }


@pytest.mark.slow
def test_what_is_asked_for_in_epochs_comes_at_their_ends(make_job: MakeJob, one_icon: str):
    """24 icons, 8 a step: an epoch is 3 steps."""
    job = make_job(
        training__steps=None,
        training__epochs=3,
        training__images_per_step=8,
        training__save_every_epochs=1,
        validation__folder=one_icon,
        validation__every_steps=None,
        validation__every_epochs=2,
    )
    go(job)
    storage = open_store(job)
    assert checkpoint_steps(storage) == [3, 6, 9]
    assert [r["done"] for r in read_metrics(storage) if "validation" in r] == [0, 6, 9]


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_early_with_its_best(make_spoiled: MakeJob):
    job = make_spoiled()
    claim(job)
    outcome = go(job)
    storage = open_store(job)
    losses = {r["done"]: r["validation"] for r in read_metrics(storage) if "validation" in r}
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert not outcome.stopped
    assert outcome.steps == best + PATIENCE < 30
    assert checkpoint_steps(storage) == [best, outcome.steps], "the best and the newest stay"
    result = finish(job, storage)
    assert result["ended"] == f"early stop at step {outcome.steps}, best {best}"
    assert (result["best_step"], result["validation_best"]) == (best, losses[best])
    for word, step in (("adapter", outcome.steps), ("best", best)):
        kept = storage.read(f"checkpoints/{step:06d}/adapter.safetensors")
        assert storage.read(result["files"][word]) == kept
    again = train_small(job)
    assert again == {**result, "already_done": True}


@pytest.mark.slow
def test_one_that_ended_early_is_not_extended(make_spoiled: MakeJob):
    job = make_spoiled()
    claim(job)
    ended_at = go(job).steps
    finish(job, open_store(job))
    longer = job.model_copy(update={"training": job.training.model_copy(update={"steps": 60})})
    assert claim(longer, extend=True)[1] is None
    assert go(longer).steps == ended_at
    assert finish(longer, open_store(job))["ended"].startswith("early stop")


@pytest.mark.slow
def test_overfitting_is_told_once_and_names_the_step_to_use(make_spoiled: MakeJob):
    job = make_spoiled(validation__patience=None, training__steps=18)
    go(job)
    storage = open_store(job)
    events = read_segments(storage, "events")
    (told,) = [event for event in events if event["event"] == "overfitting"]
    rows = {row["done"]: row for row in read_metrics(storage) if "validation" in row}
    best = min((step for step in rows if step), key=lambda step: rows[step]["validation"])
    parted = [
        row["validation"] > 1.02 * rows[best]["validation"]
        and row["training"] < rows[best]["training"]
        for row in rows.values()
    ]
    first = next(step for step in rows if step > best + 2 and all(parted[step - 2 : step + 1]))
    assert (told["best_step"], told["step"]) == (best, first)
    assert told["held_out"] == [rows[best]["validation"], rows[first]["validation"]]
    assert told["training"] == [rows[best]["training"], rows[first]["training"]]
    assert f"Step {best} is the one to use" in told["warning"]


@pytest.mark.slow
def test_a_run_that_was_killed_or_stopped_ends_as_the_unbroken_one(make_spoiled: MakeJob):
    whole = make_spoiled(name="whole")
    last = go(whole).steps
    expected = ending(whole)
    assert expected["result"]["ended"].startswith("early stop")
    assert [event["event"] for event in expected["said"]] == ["overfitting", "early stop"]
    for step in (5, last):
        killed = make_spoiled(name=f"killed-{step}")
        kill_after_measuring(killed, step)
        assert go(killed).steps == last
        assert ending(killed) == expected, f"killed after the measurement of step {step}"
    best = expected["result"]["best_step"]
    del expected["facts"]  # a checkpoint that was saved unmeasured stays as it is
    for step in (best, last):
        stopped = make_spoiled(name=f"stopped-{step}")
        outcome = stop_after(stopped, step)
        assert (outcome.steps, outcome.stopped) == (step, True)
        assert go(stopped).steps == last
        left = ending(stopped)
        del left["facts"]
        assert left == expected, f"stopped after step {step}, not measured"


def end_as(rank: int, job: Job) -> tuple[int, bool]:
    outcome = go(job, Distributed())
    return outcome.steps, outcome.stopped


@pytest.mark.slow
def test_two_workers_end_where_one_does(make_spoiled: MakeJob):
    exact = {"training__sums": "exact", "training__precision": "fp64"}
    alone, two = (make_spoiled(name=name, **exact) for name in ("alone", "two"))
    outcome = go(alone)
    assert together(2, end_as, two) == [(outcome.steps, False)] * 2
    steps = [checkpoint_steps(open_store(job)) for job in (alone, two)]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_what_is_measured_is_the_average_that_people_get(make_spoiled: MakeJob):
    run = open_whole(make_spoiled(ema__decay=0.9, training__steps=3, validation__patience=None))
    run_training(run)
    assert run.validation
    trained = run.validation.measure(run.parts)
    with run.parts.shown():
        shown = run.validation.measure(run.parts)
    run.close()
    rows = [row for row in read_metrics(run.storage) if "validation" in row]
    assert rows[-1]["validation"] == shown["validation"]
    assert rows[-1]["validation"] != trained["validation"]


def test_a_broken_step_stops_the_run_and_names_its_images(make_spoiled: MakeJob):
    run = open_whole(make_spoiled(log__every_steps=100, validation__every_steps=10))
    seen, predict = [0], run.parts.predict

    def spoil(*given: Any) -> Any:
        seen[0] += torch.is_grad_enabled()
        return predict(*given) * (float("nan") if seen[0] == 3 else 1.0)

    run.parts.predict = spoil
    with pytest.raises(TrainingError, match=r"step 3: the loss is nan.*alien\.png.*of step 2\."):
        run_training(run)
    run.close()
    assert checkpoint_steps(run.storage) == [2]
    broken = [row for row in read_metrics(run.storage) if row.get("loss") != row.get("loss")]
    assert [row["done"] for row in broken] == [3]
    json.dumps(broken)
