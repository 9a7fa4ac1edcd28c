"""What happens between steps: stopping, resuming, saving, looking, giving up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Child
from small import MakeJob, final_state, open_run, saved_file, train_small

from raylora.assemble import claim, open_store
from raylora.base.errors import JobError, TrainingError
from raylora.base.segments import read_segments
from raylora.job import Job, with_overrides
from raylora.local import train
from raylora.training.checkpoint import checkpoint_steps
from raylora.training.loop import Outcome, run_training
from raylora.training.report import read_metrics

PREVIEWS = {
    "preview__prompts": ["ink icon, red heart, symbol"],
    "preview__every_steps": 2,
    "preview__steps": 2,
}


def train_part(job: Job, steps: int) -> Outcome:
    """The first steps of a job, as if it had been killed right after a checkpoint."""
    run = open_run(job, report=True)
    try:
        run.course = replace(run.course, total_steps=steps)
        return run_training(run)
    finally:
        run.close()


def events(job: Job) -> list[dict[str, Any]]:
    return read_segments(open_store(job), "events")


def assert_same_state(first: Job, second: Job) -> None:
    left, right = final_state(first), final_state(second)
    assert left.keys() == right.keys()
    for name in right:
        assert torch.equal(left[name], right[name]), name


def train_until_told(job: Job, told: str) -> None:
    """Train, and say in a file at which step it is."""
    torch.set_num_threads(1)

    def tell(row: dict[str, Any]) -> None:
        if "images_per_second" in row:
            Path(told).write_text(str(row["done"]))

    train(job, prove=False, sinks=[tell])


@pytest.mark.slow
def test_sigterm_saves_and_leaves_and_the_next_start_ends_bit_equal(
    tmp_path: Path, make_job: MakeJob, one_icon: str
):
    given = {
        "training__steps": 20,
        "training__images_per_step": 1,
        "log__every_steps": 1,
        "validation__folder": one_icon,
        "validation__every_steps": 1,
    }
    unbroken, stopped = (make_job(name=name, **given) for name in ("unbroken", "stopped"))
    told = tmp_path / "told"
    child = Child(train_until_told, stopped, str(told))
    while not told.exists():
        assert child.running(0.02)
    assert child.process.pid
    os.kill(child.process.pid, signal.SIGTERM)
    with pytest.raises(AssertionError, match=r"TrainingError: stopped at step \d+ as asked; the"):
        child.result()
    (left_at,) = checkpoint_steps(open_store(stopped))
    assert 0 < left_at < 20
    assert events(stopped)[-1]["event"] == "stopped"
    train_small(stopped)
    train_small(unbroken)
    assert_same_state(stopped, unbroken)
    rows = [
        [(row["done"], row.get("loss"), row.get("validation")) for row in read_metrics(where)]
        for where in (open_store(stopped), open_store(unbroken))
    ]
    assert rows[0] == rows[1], "a measurement is missing where the run was stopped"


@pytest.mark.slow
def test_a_run_resumes_from_its_newest_checkpoint(make_job: MakeJob):
    whole, resumed = (make_job(name=n, training__save_every_steps=2) for n in ("whole", "resumed"))
    train_small(whole)
    train_part(resumed, 3)
    train_small(resumed)
    assert_same_state(resumed, whole)
    assert [e["step"] for e in events(resumed) if e["event"] == "resumed"] == [3]
    for name, tensor in saved_file(whole).items():
        assert torch.equal(saved_file(resumed)[name], tensor)


@pytest.mark.slow
def test_looking_changes_nothing_that_is_trained(make_job: MakeJob, one_icon: str):
    blind = make_job(name="blind")
    looking = make_job(
        name="looking",
        validation__folder=one_icon,
        validation__every_steps=2,
        validation__timesteps=[400],
        training__save_every_steps=2,
        log__every_steps=1,
        **PREVIEWS,
    )
    train_small(blind)
    train_small(looking)
    assert_same_state(looking, blind)
    samples = [entry.key for entry in open_store(looking).entries("samples")]
    assert samples == [f"samples/{step:06d}/000.png" for step in (0, 2, 4, 6)]
    measured = [row["done"] for row in read_metrics(open_store(looking)) if "validation" in row]
    assert measured == [0, 2, 4, 6]


@pytest.mark.slow
def test_only_the_last_checkpoints_are_kept(make_job: MakeJob):
    job = make_job(training__save_every_steps=1, training__keep_last=2)
    train_small(job)
    storage = open_store(job)
    assert checkpoint_steps(storage) == [5, 6]
    assert {entry.key.split("/")[1] for entry in storage.entries("checkpoints")} == {
        "000005",
        "000006",
    }


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(make_job: MakeJob):
    job = make_job(training__steps=1)
    result = train_small(job)
    before = open_store(job).entries()
    again = train_small(job)
    assert again == {**result, "already_done": True}
    assert open_store(job).entries() == before


@pytest.mark.slow
def test_a_finished_run_goes_on_when_more_is_asked_for_by_name(make_job: MakeJob):
    job = make_job(training__steps=2)
    longer = job.model_copy(update={"training": job.training.model_copy(update={"steps": 4})})
    train_small(job)
    with pytest.raises(JobError, match="add --extend"):
        train_small(longer)
    train_part_of_extension(longer, 3)
    result = train(longer, prove=False)
    assert result["steps"] == 4
    assert "already_done" not in result
    assert [row["done"] for row in read_metrics(open_store(job))] == [1, 2, 3, 4]
    assert checkpoint_steps(open_store(job))[-1] == 4
    assert json.loads(open_store(job).read("result.json"))["steps"] == 4


def train_part_of_extension(job: Job, steps: int) -> None:
    assert claim(job, extend=True)[1] is None
    train_part(job, steps)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("dataset", "the images or captions are not those that this run was trained on up to"),
        ("held_out", "the held-out images or captions are not those"),
        ("base", "the base's weights are not those"),
    ],
)
def test_what_a_run_was_not_trained_on_is_refused(make_job: MakeJob, word: str, said: str):
    job = make_job(training__steps=2)
    train_part(job, 1)
    run = open_run(job)
    run.content = {**run.content, word: "another"}
    with pytest.raises(TrainingError, match=said):
        run_training(run)
    run.close()


def test_a_run_goes_on_where_images_and_base_were_moved_to(make_job: MakeJob, tmp_path: Path):
    job = make_job(training__steps=2)
    claim(job)
    train_part(job, 1)
    for old, new in ((job.data.folder, "images"), (job.family.weights, "base")):
        shutil.copytree(old, tmp_path / new)
    there = with_overrides(
        job,
        {"data.folder": str(tmp_path / "images"), "family.weights": str(tmp_path / "base")},
    )
    with pytest.raises(JobError, match="add --moved"):
        train_small(there)
    assert train(there, moved=True, prove=False)["steps"] == 2
    with pytest.raises(JobError, match="add --moved"):
        train_small(job)
    assert train(job, moved=True, prove=False)["already_done"]
    assert train_small(job)["already_done"]


def test_a_run_that_was_started_again_elsewhere_saves_no_more(make_job: MakeJob):
    job = make_job(training__steps=2, training__save_every_steps=1)
    run = open_run(job, report=True)
    later = open_run(job, report=True)
    with pytest.raises(TrainingError, match="was started again by process"):
        run_training(run)
    run.close()
    run_training(later)
    later.close()
    assert checkpoint_steps(open_store(job)) == [1, 2]


def test_a_changed_caption_is_another_data_set(make_job: MakeJob, one_icon: str):
    job = make_job(data__folder=one_icon, training__steps=2, training__images_per_step=1)
    train_part(job, 1)
    Path(one_icon, "alien.txt").write_text("something else")
    with pytest.raises(TrainingError, match="images or captions are not those"):
        train_small(job)


def test_an_adapter_with_nan_is_not_saved(make_job: MakeJob):
    job = make_job(training__steps=3, training__save_every_steps=1)
    run = open_run(job, report=True)
    step = run.parts.mover.optimizer.step

    def spoil(*_: object) -> None:
        step()
        if len(checkpoint_steps(run.storage)) == 1:
            run.parts.adapter.values.data[5] = float("nan")

    run.parts.mover.optimizer.step = spoil  # type: ignore[assignment]
    with pytest.raises(TrainingError, match="NaN or infinity after step 2"):
        run_training(run)
    run.close()
    assert checkpoint_steps(run.storage) == [1]


def test_workers_that_see_different_stores_are_told(make_job: MakeJob):
    run = open_run(make_job())

    class Elsewhere:
        rank, size = 0, 2

        def gather(self, numbers: list[float]) -> list[list[float]]:
            return [numbers, [12.0]]

    run.parts.group = Elsewhere()  # type: ignore[assignment]
    with pytest.raises(TrainingError, match="see different newest checkpoints"):
        run_training(run)
    run.close()


def test_the_signal_handler_that_was_there_is_back_afterwards(make_job: MakeJob):
    before = signal.getsignal(signal.SIGTERM)
    train_part(make_job(), 1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_before_the_last_step_needs_no_step_after_it(make_job: MakeJob):
    run = open_run(make_job(training__steps=3), report=True)
    predict = run.parts.predict

    def ask(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # the handler runs between two bytecodes
        return predict(*given)

    run.parts.predict = ask
    outcome = run_training(run)
    run.close()
    assert (outcome.steps, outcome.stopped) == (2, True)
    assert checkpoint_steps(run.storage) == [2]
