"""TensorBoard's own reader finds in the run's folder what was told."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small import MakeJob, open_run

from raylora.base.errors import OptionError
from raylora.base.storage import Storage, open_storage
from raylora.training.loop import run_training
from raylora.training.options import LogOptions
from raylora.training.report import read_metrics
from raylora.training.to_tensorboard import TensorBoardFiles
from raylora.training.trackers import make_trackers, report_problems


@pytest.fixture
def here(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


def reader(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder))


def curve(held: Any, tag: str) -> list[tuple[int, float]]:
    held.Reload()
    return [(event.step, event.value) for event in held.Scalars(tag)]


def tell(files: TensorBoardFiles, steps: range, value: float) -> None:
    for step in steps:
        files.add(step, {"loss/current": value * step, "lr/denoiser": 0.5})


@pytest.mark.slow  # importing TensorBoard
def test_it_reads_every_number_back(here: Storage, tmp_path: Path):
    files = TensorBoardFiles(here, attempt=1)
    files.begin(0)
    tell(files, range(1, 4), 0.25)
    files.add(3, {"validation": 0.125})
    files.close(finished=True)
    held = reader(tmp_path / "run/tensorboard")
    assert curve(held, "loss/current") == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert curve(held, "validation") == [(3, 0.125)]
    assert set(held.Tags()["scalars"]) == {"loss/current", "lr/denoiser", "validation"}


@pytest.mark.slow
def test_one_that_is_open_sees_what_comes_later(here: Storage, tmp_path: Path):
    files = TensorBoardFiles(here, attempt=1)
    files.begin(0)
    tell(files, range(1, 3), 0.25)
    files.flush()
    held = reader(tmp_path / "run/tensorboard")
    assert len(curve(held, "loss/current")) == 2
    tell(files, range(3, 5), 0.25)
    files.flush()
    assert curve(held, "loss/current") == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]


@pytest.mark.slow
def test_a_real_run_and_its_resume_are_one_curve(make_job: MakeJob):
    job = make_job(training__steps=5, training__save_every_steps=2, log__tensorboard=True)
    for steps in (3, 5):
        run = open_run(job, report=True)
        run.course = replace(run.course, total_steps=steps)
        run_training(run)
        run.close()
    held = reader(Path(run.storage.url.removeprefix("file://")) / "tensorboard")
    rows = {row["done"]: row["loss"] for row in read_metrics(run.storage)}
    assert curve(held, "loss/current") == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in sorted(rows.items())
    ]
    average = dict(curve(held, "loss/average"))
    assert average[5] == pytest.approx(sum(rows.values()) / 5, rel=1e-6)  # an epoch has 6 steps
    assert any(tag.startswith("lr/") for tag in held.Tags()["scalars"])


@pytest.mark.slow
@pytest.mark.parametrize("done", [0, 2])
def test_after_a_resume_each_step_is_there_once_as_the_newest_attempt_had_it(
    here: Storage, tmp_path: Path, done: int
):
    first = TensorBoardFiles(here, attempt=1)
    first.begin(0)
    tell(first, range(1, 6), 1.0)
    first.flush()
    second = TensorBoardFiles(here, attempt=2)
    second.begin(done)
    tell(second, range(done + 1, 5), 2.0)
    second.close(finished=True)
    kept = [(step, float(step)) for step in range(1, done + 1)]
    again = [(step, 2.0 * step) for step in range(done + 1, 5)]
    assert curve(reader(tmp_path / "run/tensorboard"), "loss/current") == kept + again


def test_files_are_written_whole_into_any_store(storage: Storage):
    files = TensorBoardFiles(storage, attempt=12)
    files.begin(0)
    for step in (1, 2):
        tell(files, range(step, step + 1), 1.0)
        files.flush()
        files.flush()
    names = [entry.key for entry in storage.entries()]
    assert names == [f"tensorboard/events.out.tfevents.0012-{n:06d}.raylora" for n in (0, 1)]


def test_a_file_comes_every_few_seconds_and_later_less_often(
    here: Storage, monkeypatch: pytest.MonkeyPatch
):
    clock = 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    files = TensorBoardFiles(here, attempt=1)
    files.begin(0)
    written = []
    for second in range(24 * 3600 // 5):
        clock = 5.0 * second
        files.add(second, {"loss/current": 1.0})
        written.append(files._number)
    assert written[60 // 5] == 4
    assert 200 < written[-1] < 400


def test_a_missing_package_is_told_when_the_job_is_checked(
    here: Storage, monkeypatch: pytest.MonkeyPatch
):
    options = LogOptions(tensorboard=True)
    assert report_problems(options) == []
    monkeypatch.setattr("raylora.training.trackers.find_spec", lambda name: None)
    (problem,) = report_problems(options)
    assert "tensorboardX" in problem
    assert 'pip install "raylora[tensorboard]"' in problem
    assert report_problems(LogOptions()) == []
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.event_pb2", None)
    with pytest.raises(OptionError, match="raylora\\[tensorboard\\]"):
        make_trackers(options, here, attempt=1, name="cats", job={})


def test_nothing_asked_for_is_no_tracker(here: Storage):
    assert make_trackers(LogOptions(), here, attempt=1, name="cats", job={}) == []
    assert here.entries() == []
