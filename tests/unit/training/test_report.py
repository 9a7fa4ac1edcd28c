"""Metrics and events: rows in storage, lines for people, and time that is not training's."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from raylora.base.segments import SegmentWriter, read_segments
from raylora.base.storage import Storage, open_storage
from raylora.training.report import (
    Reporter,
    Row,
    log_sink,
    peak_bytes,
    progress_line,
    read_metrics,
)
from raylora.training.step import StepResult

CPU = torch.device("cpu")


def result(loss: float, images: int = 4) -> StepResult:
    return StepResult(
        loss=torch.tensor(loss),
        gradient_norm=torch.tensor(0.5),
        images=images,
        my_images=images,
        my_seconds=0.1,
        wait_seconds=0.25,
        stop=False,
    )


def report(storage: Storage, *, every: int = 2, total: int = 5, attempt: int = 1) -> Any:
    rows: list[Row] = []
    reporter = Reporter(
        storage,
        attempt=attempt,
        total_steps=total,
        every_steps=every,
        device=CPU,
        sinks=[rows.append],
    )
    return reporter, rows


def note(reporter: Reporter, step: int, loss: float = 1.0) -> None:
    reporter.step(step, result(loss), learning_rate=1e-3, samples=["00ff"], shares=[3.0, 1.0])


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
    reporter.step(0, lazy, learning_rate=1.0, samples=[], shares=[])
    with pytest.raises(AssertionError, match="waited for"):
        reporter.flush()


def test_a_progress_line_has_units_in_one_order():
    row = {
        "done": 120,
        "total": 2000,
        "loss": 0.08312,
        "learning_rate": 9.8e-5,
        "images_per_second": 3.421,
        "eta_seconds": 250.0,
        "peak_bytes": int(17.2 * 2**30),
        "wait_seconds": 0.031,
    }
    assert progress_line(row) == (
        "  120/2000  loss 0.0831  lr 9.80e-05  3.42 img/s  ETA 4 min 10 s  peak 17.20 GiB  "
        "wait 0.03 s"
    )


def test_the_log_says_each_kind_of_row(caplog: pytest.LogCaptureFixture, here: Storage):
    reporter, rows = report(here, every=1, total=1)
    with caplog.at_level("INFO", logger="raylora"):
        note(reporter, 0)
        reporter.measured(1, {"validation": 0.5, "validation/400": 0.5})
        reporter.event("saved", step=1)
        for row in rows:
            log_sink(row)
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("    1/1  loss 1.0000  lr 1.00e-03")
    assert told[1] == "    1       held-out loss 0.5000"
    assert told[2] == "saved  step 1"


def test_memory_is_that_of_this_process():
    held = peak_bytes(CPU)
    assert 2**24 < held < 2**40


def test_rows_are_json(here: Storage):
    reporter, rows = report(here, every=1)
    note(reporter, 0)
    reporter.event("shares", weights=[0.5, 0.5])
    json.dumps(rows)
