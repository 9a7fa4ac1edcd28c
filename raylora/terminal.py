"""What a person sees while a run goes on, and when it is done."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from raylora.base.units import duration, gib, mib
from raylora.training.report import Row, Sink, log_sink

console = Console(stderr=True, highlight=False)


@contextmanager
def progress_sink() -> Iterator[Sink]:
    """A live bar on a terminal; plain lines in a pipe or a log."""
    if not sys.stderr.isatty():
        yield log_sink
        return
    with _bar() as progress:
        task = progress.add_task("train", total=None, said="starting")
        yield lambda row: _show(progress, task, row)


def _bar() -> Progress:
    return Progress(
        TextColumn("[bold]step {task.completed:.0f}/{task.total}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[said]}"),
        console=console,
    )


def _show(progress: Progress, task: TaskID, row: Row) -> None:
    if "images_per_second" in row:
        said = (
            f"loss {row['loss']:.4f}  lr {row['learning_rate']:.1e}  "
            f"{row['images_per_second']:.1f} img/s  ETA {duration(row['eta_seconds'])}  "
            f"memory {gib(row['peak_bytes'])}"
        )
        progress.update(task, completed=row["done"], total=row["total"], said=said)
    elif "validation" in row:
        progress.console.print(f"step {row['done']:5d}  held-out loss {row['validation']:.4f}")
    elif row.get("event") in ("resumed", "saved", "shares", "drift mended", "previews left out"):
        facts = "  ".join(f"{name} {value}" for name, value in row.items() if name != "event")
        progress.console.print(f"[dim]{row['event']}  {facts}[/dim]")


def show_arithmetic(numbers: dict[str, Any]) -> None:
    """The steps arithmetic in plain words."""
    buckets = ", ".join(f"{size}: {count}" for size, count in numbers["buckets"].items())
    lines = Table.grid(padding=(0, 2))
    lines.add_row("images", f"{numbers['images']} ({numbers['bad_images']} bad, left out)")
    lines.add_row("with repeats", f"{numbers['images_with_repeats']} an epoch")
    lines.add_row("buckets", buckets)
    lines.add_row(
        "steps",
        f"{numbers['steps_per_epoch']} an epoch at {numbers['images_per_step']} images a step, "
        "whatever the number of workers",
    )
    lines.add_row("run", f"{numbers['steps']} steps = {numbers['epochs']} epochs")
    lines.add_row("held out", f"{numbers['held_out_images']} images")
    encode = numbers["to_encode"]
    lines.add_row("to encode", f"{encode['images']} images, {encode['captions']} captions")
    console.print(lines)


def show_result(result: dict[str, Any], folder: str) -> None:
    """The closing summary: what was made, where, and what to try next."""
    lines = Table.grid(padding=(0, 2))
    again = " (was finished already)" if result.get("already_done") else ""
    lines.add_row("run", f"{result['name']}: {result['steps']} steps{again}")
    if result["validation_first"] is not None:
        first, last = result["validation_first"], result["validation_last"]
        change = (last - first) / first * 100
        lines.add_row("held-out loss", f"{first:.4f} -> {last:.4f} ({change:+.0f} %)")
    place = _short(folder)
    for word, file in result["files"].items():
        size = f" ({mib(result['adapter_bytes'])})" if word == "adapter" else ""
        lines.add_row(word, f"{place}/{file}{size}")
    program = "raylora" if shutil.which("raylora") else _short(os.path.abspath(sys.argv[0]))
    store = place.rpartition("runs/")[0].rstrip("/") or "."
    lines.add_row("next", f"{program} inspect {place}/{result['files']['adapter']}")
    lines.add_row("", f"{program} serve {store}")
    console.print(Panel(lines, title="done", title_align="left", expand=False))


def _short(place: str) -> str:
    """A path as one would type it here."""
    path = place.removeprefix("file://")
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path
