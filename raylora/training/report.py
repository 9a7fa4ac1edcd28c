"""Metrics and events of a run: rows in numbered segments, and lines for people."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylora.base.errors import TrainingError
from raylora.base.log import get_logger
from raylora.base.segments import SegmentWriter, read_segments
from raylora.base.storage import Storage
from raylora.base.units import duration, gib
from raylora.training.checkpoint import checkpoint_steps
from raylora.training.memory import DeviceMemory
from raylora.training.step import StepResult
from raylora.training.trackers import Tracker, progress_scalars, step_scalars

log = get_logger("step")

Row = dict[str, Any]
Sink = Callable[[Row], None]
"""Told every progress row: a terminal's progress bar, a Ray actor, a sweep's scheduler."""


@dataclass(frozen=True)
class _Pending:
    step: int
    result: StepResult
    samples: list[str]
    shares: list[float]
    keys: Callable[[], list[str]]


def worker_teller(storage: Storage, *, attempt: int, rank: int) -> Callable[..., None]:
    """Keeps events, as (kind, **facts), of a worker that has no reporter, beside worker 0's."""
    folder = f"events/worker-{rank}"
    writer = SegmentWriter(storage, folder, attempt=attempt, every_seconds=0.0)

    def tell(kind: str, **facts: Any) -> None:
        writer.add({"event": kind, "time": time.time(), "worker": rank, **facts})

    return tell


class Reporter:
    """Writes what happens; only worker 0 has one.

    Numbers stay on the device until a progress row is due, so that the step waits for nothing.

    Args:
        memory: of this worker's device.
        sinks: told progress rows, measurements and events.
        trackers: told the numbers of every step.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        attempt: int,
        total_steps: int,
        every_steps: int,
        memory: DeviceMemory,
        sinks: Sequence[Sink] = (),
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.sinks = list(sinks)
        self.trackers = list(trackers)
        self.total_steps = total_steps
        self._storage = storage
        self._every_steps = every_steps
        self._metrics = SegmentWriter(storage, "metrics", attempt=attempt)
        self._events = SegmentWriter(storage, "events", attempt=attempt, every_seconds=0.0)
        self._pending: list[_Pending] = []
        self._memory = memory
        self._epoch = _Epoch(1)
        self._images = 0
        self._since = time.monotonic()
        self._finished = False

    def begin(self, done: int, *, steps_per_epoch: int) -> None:
        """Steps begin after `done` of them; call it once, before the first."""
        self._epoch = _Epoch(steps_per_epoch)
        if done:
            for row in read_metrics(self._storage):
                if "loss" in row and row["done"] <= done and not row.get("skipped"):
                    self._epoch.add(row["loss"])
        for tracker in self.trackers:
            tracker.begin(done)

    def event(self, kind: str, **facts: Any) -> None:
        """One thing that happened, kept with its time; a fact `warning` is a sentence for people.

        "trained" and "early stop" say that the run is finished.
        """
        self._finished |= kind in ("trained", "early stop")
        self._events.add({"event": kind, "time": time.time(), **facts})
        for sink in self.sinks:
            sink({"event": kind, **facts})

    def step(
        self,
        step: int,
        result: StepResult,
        *,
        samples: list[str],
        shares: list[float],
        keys: Callable[[], list[str]] = list,
    ) -> None:
        """Remember a step; with (seed, samples, shares) it can be computed again.

        Args:
            keys: the images of the step by their paths, asked for where its numbers are broken.

        Raises:
            TrainingError: a step since the last progress row has a loss or gradient that is not
                finite.
        """
        self._pending.append(_Pending(step, result, samples, shares, keys))
        self._images += result.images
        if (step + 1) % self._every_steps == 0 or step + 1 == self.total_steps:
            self._progress()

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        """Validation numbers after `step` steps."""
        self._metrics.add({"done": step, **numbers})
        for sink in self.sinks:
            sink({"done": step, **numbers})
        self._track(step, numbers)

    def pause(self) -> Callable[[], None]:
        """Stop the clock for something that is not training; call the result to go on."""
        began = time.monotonic()

        def go_on() -> None:
            self._since += time.monotonic() - began

        return go_on

    def flush(self) -> None:
        """Store everything so far."""
        self._write_pending()
        self._store()

    def close(self) -> None:
        """Let go of the trackers; what was not flushed by now belongs to a run that failed."""
        for tracker in self.trackers:
            tracker.close(finished=self._finished)
        self.trackers.clear()

    def _store(self) -> None:
        self._metrics.flush()
        self._events.flush()
        for tracker in self.trackers:
            tracker.flush()

    def _write_pending(self) -> list[Row]:
        pending, self._pending = self._pending, []
        rows = [_row(held) for held in pending]
        for held, row in zip(pending, rows, strict=True):
            self._metrics.add(row)
            if not row.get("skipped"):
                self._refuse_broken(held, row)
                self._epoch.add(row["loss"])
            self._track(row["done"], step_scalars(row, self._epoch.mean))
        return rows

    def _refuse_broken(self, held: _Pending, row: Row) -> None:
        if math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"]):
            return
        keys = held.keys()
        found = {"loss": row["loss"], "gradient_norm": row["gradient_norm"]}
        self.event("not finite", step=row["done"], images=keys, **found)
        self._store()
        saved = checkpoint_steps(self._storage)
        newest = f"that of step {saved[-1]}" if saved else "none: nothing was saved yet"
        more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
        raise TrainingError(
            f"step {row['done']}: the loss is {row['loss']:g} and the gradient's norm is "
            f"{row['gradient_norm']:g}. Its images: {', '.join(keys[:_NAMED])}{more}. The newest "
            f"checkpoint is {newest}. The same command would come here again: look at these "
            "images, or lower optimizer.learning_rate or set training.on_nan: skip, under another "
            "`name`."
        )

    def _track(self, done: int, numbers: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.add(done, numbers)

    def _progress(self) -> None:
        rows = self._write_pending()
        seconds = max(time.monotonic() - self._since, 1e-9)
        done = rows[-1]["done"]
        losses = [row["loss"] for row in rows if not row.get("skipped")]
        row = {
            "done": done,
            "total": self.total_steps,
            "epoch": done / self._epoch.steps,
            "loss": sum(losses) / len(losses) if losses else math.nan,
            "loss_average": self._epoch.mean,
            "learning_rate": _shown_rate(rows[-1]["rates"]),
            "images_per_second": self._images / seconds,
            "eta_seconds": (self.total_steps - done) * seconds / len(rows),
            **self._memory.numbers(),
            "wait_seconds": sum(r["wait_seconds"] for r in rows),
        }
        for sink in self.sinks:
            sink(row)
        self._track(done, progress_scalars(row))
        self._images = 0
        self._since = time.monotonic()


_NAMED = 8


def _row(held: _Pending) -> Row:
    """A step's row; here the device is waited for."""
    result = held.result
    extra = {name: float(number) for name, number in result.extra.items()}
    return {
        "done": held.step + 1,
        "loss": float(result.loss),
        "gradient_norm": float(result.gradient_norm),
        "learning_rate": next(iter(result.rates.values()), 0.0),
        "rates": dict(result.rates),
        **({"extra": extra} if extra else {}),
        **({"skipped": True} if result.skipped else {}),
        "images": result.images,
        "wait_seconds": round(result.wait_seconds, 6),
        "samples": held.samples,
        "shares": held.shares,
    }


def _shown_rate(rates: Mapping[str, float]) -> float:
    """The one rate of a progress line: the largest group's, LoRA+'s fast ones left out.

    The first group is the text encoder's, which may have stopped or have a lower rate.
    """
    slow = [rate for name, rate in rates.items() if not name.endswith(" plus")]
    return max(slow or rates.values(), key=abs, default=0.0)


class _Epoch:
    """The mean loss over the last epoch's steps; in the first epoch, over those so far."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._losses: deque[float] = deque()
        self._sum = 0.0

    def add(self, loss: float) -> None:
        """Take the next step's loss."""
        self._losses.append(loss)
        self._sum += loss
        if len(self._losses) > self.steps:
            self._sum -= self._losses.popleft()

    @property
    def mean(self) -> float:
        """NaN before the first."""
        return self._sum / len(self._losses) if self._losses else math.nan


def log_sink(row: Row) -> None:
    """One line per progress row, for logs and pipes."""
    if "images_per_second" in row:
        log.info("%s", progress_line(row))
    elif "validation" in row:
        log.info("%5d       %s", row["done"], measured_line(row))
    elif "warning" in row:
        log.warning("%s", row["warning"])
    elif "event" in row:
        facts = "  ".join(f"{k} {v}" for k, v in row.items() if k != "event")
        log.info("%s  %s", row["event"], facts)


def progress_line(row: Row) -> str:
    """`120/2000  loss 0.0831  mean 0.0845  lr 9.80e-05  3.42 img/s  ETA 4 min 10 s  …`."""
    return (
        f"{row['done']:5d}/{row['total']}  loss {row['loss']:.4f}  mean {row['loss_average']:.4f}  "
        f"lr {row['learning_rate']:.2e}  {row['images_per_second']:.2f} img/s  "
        f"ETA {duration(row['eta_seconds'])}  {memory_line(row)}  wait {row['wait_seconds']:.2f} s"
    )


def memory_line(row: Row) -> str:
    """`held 12.10 GiB  peak 17.20 GiB of 22.20 GiB`; a process's has no "of"."""
    of = f" of {gib(row['total_bytes'])}" if "total_bytes" in row else ""
    return f"held {gib(row['memory_bytes'])}  peak {gib(row['peak_bytes'])}{of}"


def measured_line(row: Row) -> str:
    """`held-out loss 0.0831`, and that of images trained on where they are measured."""
    training = f"  of images trained on {row['training']:.4f}" if "training" in row else ""
    return f"held-out loss {row['validation']:.4f}{training}"


def read_metrics(storage: Storage) -> list[Row]:
    """Rows by step; where an attempt did a step again after a kill, the newest attempt's."""
    newest: dict[tuple[int, bool], Row] = {}
    for row in read_segments(storage, "metrics"):
        key = (row["done"], "validation" in row)
        if key not in newest or newest[key]["attempt"] <= row["attempt"]:
            newest[key] = row
    return [newest[key] for key in sorted(newest)]
