"""Metrics and events: rows in storage, lines for people, and time that is not training's."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from raylora.base.errors import TrainingError
from raylora.base.segments import SegmentWriter, read_segments
from raylora.base.storage import Storage, open_storage
from raylora.training.checkpoint import State, write_checkpoint
from raylora.training.memory import DeviceMemory
from raylora.training.report import (
    Reporter,
    Row,
    log_sink,
    progress_line,
    read_metrics,
)
from raylora.training.step import StepResult
from raylora.training.trackers import Tracker

CPU = torch.device("cpu")


def result(loss: float, **more: Any) -> StepResult:
    given: dict[str, Any] = {
        "loss": torch.as_tensor(loss),
        "gradient_norm": torch.tensor(0.5),
        "images": 4,
        "my_images": 4,
        "my_seconds": 0.1,
        "wait_seconds": 0.25,
        "stop": False,
        "rates": {"denoiser": 1e-3},
    }
    return StepResult(**{**given, **more})


def report(
    storage: Storage,
    *,
    every: int = 2,
    total: int = 5,
    attempt: int = 1,
    trackers: Sequence[Tracker] = (),
) -> tuple[Reporter, list[Row]]:
    rows: list[Row] = []
    reporter = Reporter(
        storage,
        attempt=attempt,
        total_steps=total,
        every_steps=every,
        memory=DeviceMemory(CPU),
        sinks=[rows.append],
        trackers=trackers,
    )
    return reporter, rows


def note(reporter: Reporter, step: int, loss: float = 1.0, **more: Any) -> None:
    reporter.step(
        step,
        result(loss, **more),
        samples=["00ff"],
        shares=[3.0, 1.0],
        keys=lambda: [f"image-{step}-{i}.png" for i in range(10)],
    )


class Told:
    """A tracker that remembers what it was told."""

    def __init__(self) -> None:
        self.numbers: list[tuple[int, dict[str, float]]] = []
        self.calls: list[Any] = []

    def begin(self, done: int) -> None:
        self.calls.append(("begin", done))

    def add(self, done: int, numbers: Mapping[str, float]) -> None:
        self.numbers.append((done, dict(numbers)))

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self, *, finished: bool) -> None:
        self.calls.append(("close", finished))

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(done, numbers[name]) for done, numbers in self.numbers if name in numbers]


@pytest.fixture
def here(tmp_path) -> Storage:
    return open_storage(str(tmp_path / "run"))


def test_every_step_has_a_row_from_which_it_can_be_computed_again(storage: Storage):
    reporter, _ = report(storage)
    for step in range(3):
        note(reporter, step, loss=step + 0.5)
    reporter.flush()
    assert read_metrics(storage) == [
        {
            "done": step + 1,
            "loss": step + 0.5,
            "gradient_norm": 0.5,
            "learning_rate": 1e-3,
            "rates": {"denoiser": 1e-3},
            "images": 4,
            "wait_seconds": 0.25,
            "samples": ["00ff"],
            "shares": [3.0, 1.0],
            "attempt": 1,
        }
        for step in range(3)
    ]


def test_a_loss_keeps_all_its_digits(here: Storage):
    reporter, _ = report(here)
    loss = torch.tensor(0.1) / 3
    note(reporter, 0, loss=float(loss))
    reporter.flush()
    assert torch.tensor(read_metrics(here)[0]["loss"]) == loss


def test_progress_is_told_every_few_steps_and_at_the_end(here: Storage):
    reporter, rows = report(here, every=2, total=5)
    for step in range(5):
        note(reporter, step, loss=float(step))
    assert [(row["done"], row["total"], row["loss"]) for row in rows] == [
        (2, 5, 0.5),
        (4, 5, 2.5),
        (5, 5, 4.0),
    ]
    assert rows[0]["wait_seconds"] == 0.5
    assert rows[-1]["eta_seconds"] == 0
    assert all(row["images_per_second"] > 0 for row in rows)


def test_speed_leaves_out_what_is_not_training(here: Storage, monkeypatch: pytest.MonkeyPatch):
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    reporter, rows = report(here, every=1, total=11)
    clock = 101.0
    go_on = reporter.pause()
    clock = 151.0
    go_on()
    clock = 153.0
    note(reporter, 0)
    assert rows[0]["images_per_second"] == pytest.approx(4 / 3)
    assert rows[0]["eta_seconds"] == pytest.approx(30)


def test_the_newest_attempts_row_counts(here: Storage):
    for attempt, loss in ((1, 1.0), (2, 2.0)):
        reporter, _ = report(here, attempt=attempt)
        note(reporter, 0, loss=loss)
        if attempt == 1:
            note(reporter, 1, loss=3.0)
        reporter.measured(1, {"validation": loss})
        reporter.flush()
    rows = read_metrics(here)
    assert [(row["done"], row.get("loss"), row.get("validation")) for row in rows] == [
        (1, 2.0, None),
        (1, None, 2.0),
        (2, 3.0, None),
    ]


def test_attempts_count_as_numbers(here: Storage):
    for attempt in (9, 10):
        writer = SegmentWriter(here, "metrics", attempt=attempt)
        writer.add({"done": 1, "loss": float(attempt)})
        writer.flush()
    assert read_metrics(here)[0]["loss"] == 10.0


def test_events_are_stored_at_once_and_told(here: Storage):
    reporter, rows = report(here)
    reporter.event("saved", step=3)
    (held,) = read_segments(here, "events")
    assert (held["event"], held["step"], held["attempt"]) == ("saved", 3, 1)
    assert abs(held["time"] - time.time()) < 60
    assert rows == [{"event": "saved", "step": 3}]


def test_nothing_waits_for_the_device_before_a_progress_row(here: Storage):
    class Lazy:
        def __float__(self) -> float:
            raise AssertionError("the device was waited for")

    reporter, _ = report(here, every=10)
    lazy = StepResult(Lazy(), Lazy(), 4, 4, 0.1, 0.0, False)  # type: ignore[arg-type]
    reporter.step(0, lazy, samples=[], shares=[])
    with pytest.raises(AssertionError, match="waited for"):
        reporter.flush()


def test_a_progress_line_has_units_in_one_order():
    row = {
        "done": 120,
        "total": 2000,
        "loss": 0.08312,
        "loss_average": 0.0845,
        "learning_rate": 9.8e-5,
        "images_per_second": 3.421,
        "eta_seconds": 250.0,
        "memory_bytes": int(12.1 * 2**30),
        "peak_bytes": int(17.2 * 2**30),
        "wait_seconds": 0.031,
    }
    assert progress_line(row) == (
        "  120/2000  loss 0.0831  mean 0.0845  lr 9.80e-05  3.42 img/s  ETA 4 min 10 s  "
        "held 12.10 GiB  peak 17.20 GiB  wait 0.03 s"
    )
    assert "peak 17.20 GiB of 24.00 GiB" in progress_line({**row, "total_bytes": 24 * 2**30})


def test_the_log_says_each_kind_of_row(caplog: pytest.LogCaptureFixture, here: Storage):
    reporter, rows = report(here, every=1, total=1)
    with caplog.at_level("INFO", logger="raylora"):
        note(reporter, 0)
        reporter.measured(1, {"validation": 0.5, "validation/400": 0.5})
        reporter.event("saved", step=1)
        for row in rows:
            log_sink(row)
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("    1/1  loss 1.0000  mean 1.0000  lr 1.00e-03")
    assert told[1] == "    1       held-out loss 0.5000"
    assert told[2] == "saved  step 1"


def test_memory_is_that_of_this_process():
    before = DeviceMemory(CPU).numbers()
    assert set(before) == {"memory_bytes", "peak_bytes"}
    assert 2**24 < before["memory_bytes"] <= before["peak_bytes"] < 2**40
    held = bytearray(b"x") * 2**27
    assert DeviceMemory(CPU).numbers()["memory_bytes"] - before["memory_bytes"] > 2**26
    del held


def test_rows_are_json(here: Storage):
    reporter, rows = report(here, every=1)
    note(reporter, 0)
    reporter.event("shares", weights=[0.5, 0.5])
    json.dumps(rows)


def test_every_groups_rate_and_what_else_a_step_has_are_in_its_row(here: Storage):
    reporter, _ = report(here)
    rates = {"denoiser": 1e-3, "text_encoder": 5e-5}
    note(reporter, 0, rates=rates, extra={"loss_scale": 512.0, "norm/max": torch.tensor(0.25)})
    reporter.flush()
    (row,) = read_metrics(here)
    assert row["rates"] == rates
    assert row["learning_rate"] == 1e-3
    assert row["extra"] == {"loss_scale": 512.0, "norm/max": 0.25}
    json.dumps(row)


@pytest.mark.parametrize(
    ("rates", "shown"),
    [
        ({"textencoder": 0.0, "unet": 1e-3}, 1e-3),
        ({"unet": 1e-4, "unet plus": 1.6e-3}, 1e-4),
        ({"textencoder": -1e-5, "unet": -1e-4}, -1e-4),
        ({}, 0.0),
    ],
)
def test_a_progress_line_has_the_largest_groups_rate(
    here: Storage, rates: dict[str, float], shown: float
):
    reporter, rows = report(here, every=1, total=1)
    note(reporter, 0, rates=rates)
    assert rows[-1]["learning_rate"] == shown


def test_the_mean_is_of_the_last_epochs_steps(here: Storage):
    reporter, rows = report(here, every=1, total=5)
    reporter.begin(0, steps_per_epoch=3)
    for step, loss in enumerate([3.0, 1.0, 2.0, 6.0, 1.0]):
        note(reporter, step, loss=loss)
    assert [row["loss_average"] for row in rows] == pytest.approx([3.0, 2.0, 2.0, 3.0, 3.0])
    assert [row["epoch"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])


def test_a_resumed_run_says_the_mean_that_the_unbroken_one_does(here: Storage):
    losses = [3.0, 1.0, 2.0, 6.0, 1.0]
    first, _ = report(here, every=1)
    first.begin(0, steps_per_epoch=3)
    for step, loss in enumerate(losses[:4]):
        note(first, step, loss=loss)
    first.flush()
    resumed, rows = report(here, every=1, attempt=2)
    resumed.begin(3, steps_per_epoch=3)  # the fourth was not saved: it is done again
    for step, loss in list(enumerate(losses))[3:]:
        note(resumed, step, loss=loss)
    assert [row["loss_average"] for row in rows] == pytest.approx([3.0, 3.0])


@pytest.mark.parametrize("saved", [(), (2, 4)])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("word", ["loss", "gradient_norm"])
def test_numbers_that_are_not_finite_stop_the_run_and_name_the_images(
    here: Storage, word: str, broken: float, saved: tuple[int, ...]
):
    for step in saved:
        write_checkpoint(here, State(step, {"values": torch.zeros(1)}, {}), b"")
    reporter, _ = report(here, every=10, total=100)
    reporter.begin(0, steps_per_epoch=3)
    note(reporter, 4)
    note(reporter, 5, **{"loss": 1.0, word: torch.tensor(broken)})
    note(reporter, 6)
    with pytest.raises(TrainingError) as caught:
        reporter.flush()
    said = str(caught.value)
    assert said.startswith("step 6: the loss is ")
    assert f"{broken:g}" in said
    assert "image-5-0.png, image-5-1.png" in said
    assert "image-5-7.png and 2 more" in said
    assert ("checkpoint is that of step 4" if saved else "none: nothing was saved yet") in said
    assert [row["done"] for row in read_metrics(here)] == [5, 6]
    (event,) = read_segments(here, "events")
    assert (event["event"], event["step"], len(event["images"])) == ("not finite", 6, 10)


def test_a_skipped_step_is_told_and_counts_in_no_mean(here: Storage):
    reporter, rows = report(here, every=3, total=3)
    reporter.begin(0, steps_per_epoch=3)
    note(reporter, 0, loss=1.0)
    note(reporter, 1, loss=math.nan, gradient_norm=torch.tensor(math.inf), skipped=True)
    note(reporter, 2, loss=3.0)
    assert (rows[0]["loss"], rows[0]["loss_average"]) == (2.0, 2.0)
    reporter.flush()
    assert [row.get("skipped", False) for row in read_metrics(here)] == [False, True, False]
    again, rows = report(here, every=1, attempt=2)
    again.begin(3, steps_per_epoch=9)
    note(again, 3, loss=5.0)
    assert rows[0]["loss_average"] == 3.0


def test_trackers_are_told_every_step_and_measurement(here: Storage):
    tracker = Told()
    reporter, _ = report(here, every=2, total=3, trackers=[tracker])
    reporter.begin(0, steps_per_epoch=2)
    rates = {"denoiser": 1e-3, "text_encoder": 5e-5}
    for step, loss in enumerate([1.0, 3.0, 5.0]):
        note(reporter, step, loss=loss, rates=rates, extra={"d": 2e-6})
    reporter.measured(3, {"validation": 0.5, "validation/400": 0.5})
    assert tracker.curve("loss/current") == [(1, 1.0), (2, 3.0), (3, 5.0)]
    assert tracker.curve("loss/average") == [(1, 1.0), (2, 2.0), (3, 4.0)]
    assert tracker.curve("lr/text_encoder") == [(1, 5e-5), (2, 5e-5), (3, 5e-5)]
    assert tracker.curve("gradient_norm") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert tracker.curve("d") == [(1, 2e-6), (2, 2e-6), (3, 2e-6)]
    assert tracker.curve("validation/400") == [(3, 0.5)]
    assert [done for done, _ in tracker.curve("memory/peak_gib")] == [2, 3]
    reporter.flush()
    assert tracker.calls == [("begin", 0), "flush"]


@pytest.mark.parametrize(
    ("events", "finished"),
    [(["trained"], True), (["early stop"], True), (["stopped"], False), ([], False)],
)
def test_trackers_hear_whether_the_run_is_finished(
    here: Storage, events: list[str], finished: bool
):
    tracker = Told()
    reporter, _ = report(here, trackers=[tracker])
    for event in events:
        reporter.event(event, step=3)
    reporter.close()
    reporter.close()
    assert tracker.calls == [("close", finished)]


def test_a_warning_is_one_line_of_its_own(caplog: pytest.LogCaptureFixture, here: Storage):
    reporter, rows = report(here)
    reporter.event("overfitting", step=3, best_step=1, warning="it overfits")
    with caplog.at_level("INFO", logger="raylora"):
        log_sink(rows[0])
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("WARNING", "it overfits")]
