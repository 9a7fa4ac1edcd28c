"""Metrics and events of a run: rows in numbered segments, and lines for people."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raylora.base.log import get_logger
from raylora.base.segments import SegmentWriter, read_segments
from raylora.base.storage import Storage
from raylora.base.units import duration, gib
from raylora.training.step import StepResult

log = get_logger("step")

Row = dict[str, Any]
Sink = Callable[[Row], None]
"""Told every progress row: a terminal's progress bar, a Ray actor, a sweep's scheduler."""


@dataclass(frozen=True)
class _Pending:
    step: int
    result: StepResult
    learning_rate: float
    samples: list[str]
    shares: list[float]


class Reporter:
    """Writes what happens; only worker 0 has one.

    Numbers stay on the device until a progress row is due, so that the step waits for nothing.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        attempt: int,
        total_steps: int,
        every_steps: int,
        device: torch.device,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.sinks = list(sinks)
        self.total_steps = total_steps
        self._every_steps = every_steps
        self._metrics = SegmentWriter(storage, "metrics", attempt=attempt)
        self._events = SegmentWriter(storage, "events", attempt=attempt, every_seconds=0.0)
        self._pending: list[_Pending] = []
        self._device = device
        self._images = 0
        self._since = time.monotonic()

    def event(self, kind: str, **facts: Any) -> None:
        """One thing that happened, kept with its time."""
        self._events.add({"event": kind, "time": time.time(), **facts})
        for sink in self.sinks:
            sink({"event": kind, **facts})

    def step(
        self,
        step: int,
        result: StepResult,
        *,
        learning_rate: float,
        samples: list[str],
        shares: list[float],
    ) -> None:
        """Remember a step; with (seed, samples, shares) it can be computed again."""
        self._pending.append(_Pending(step, result, learning_rate, samples, shares))
        self._images += result.images
        if (step + 1) % self._every_steps == 0 or step + 1 == self.total_steps:
            self._progress()

    def measured(self, step: int, numbers: dict[str, float]) -> None:
        """Validation numbers after `step` steps."""
        self._metrics.add({"done": step, **numbers})
        for sink in self.sinks:
            sink({"done": step, **numbers})

    def pause(self) -> Callable[[], None]:
        """Stop the clock for something that is not training; call the result to go on."""
        began = time.monotonic()

        def go_on() -> None:
            self._since += time.monotonic() - began

        return go_on

    def flush(self) -> None:
        """Store everything so far."""
        self._write_pending()
        self._metrics.flush()
        self._events.flush()

    def _write_pending(self) -> list[Row]:
        rows = [
            {
                "done": held.step + 1,
                "loss": float(held.result.loss),
                "gradient_norm": float(held.result.gradient_norm),
                "learning_rate": held.learning_rate,
                "images": held.result.images,
                "wait_seconds": round(held.result.wait_seconds, 6),
                "samples": held.samples,
                "shares": held.shares,
            }
            for held in self._pending
        ]
        self._pending.clear()
        for row in rows:
            self._metrics.add(row)
        return rows

    def _progress(self) -> None:
        rows = self._write_pending()
        seconds = max(time.monotonic() - self._since, 1e-9)
        done = rows[-1]["done"]
        speed = self._images / seconds
        left = (self.total_steps - done) * seconds / len(rows)
        row = {
            "done": done,
            "total": self.total_steps,
            "loss": sum(r["loss"] for r in rows) / len(rows),
            "learning_rate": rows[-1]["learning_rate"],
            "images_per_second": speed,
            "eta_seconds": left,
            "peak_bytes": peak_bytes(self._device),
            "wait_seconds": sum(r["wait_seconds"] for r in rows),
        }
        for sink in self.sinks:
            sink(row)
        self._images = 0
        self._since = time.monotonic()


def log_sink(row: Row) -> None:
    """One line per progress row, for logs and pipes."""
    if "images_per_second" in row:
        log.info("%s", progress_line(row))
    elif "validation" in row:
        log.info("%5d       held-out loss %.4f", row["done"], row["validation"])
    elif "event" in row:
        facts = "  ".join(f"{k} {v}" for k, v in row.items() if k != "event")
        log.info("%s  %s", row["event"], facts)


def progress_line(row: Row) -> str:
    """`120/2000  loss 0.0831  lr 9.80e-05  3.42 img/s  ETA 4 min 10 s  peak 17.2 GiB`."""
    return (
        f"{row['done']:5d}/{row['total']}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  "
        f"{row['images_per_second']:.2f} img/s  ETA {duration(row['eta_seconds'])}  "
        f"peak {gib(row['peak_bytes'])}  wait {row['wait_seconds']:.2f} s"
    )


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_metrics(storage: Storage) -> list[Row]:
    """Rows by step; where an attempt did a step again after a kill, the newest attempt's."""
    newest: dict[tuple[int, bool], Row] = {}
    for row in read_segments(storage, "metrics"):
        key = (row["done"], "validation" in row)
        if key not in newest or newest[key]["attempt"] <= row["attempt"]:
            newest[key] = row
    return [newest[key] for key in sorted(newest)]
