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
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table

from raylora.base.units import GIB, duration, gib, kib, mib
from raylora.forecast import precision_words, setting_words
from raylora.training.report import Row, Sink, log_sink, measured_line

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
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[said]}"),
        console=console,
    )


_SHOWN = ("resumed", "saved", "shares", "drift mended", "previews left out", "early stop")


def _show(progress: Progress, task: TaskID, row: Row) -> None:
    if "images_per_second" in row:
        of = f" of {gib(row['total_bytes'])}" if "total_bytes" in row else ""
        said = (
            f"epoch {row['epoch']:.1f}  loss {row['loss']:.4f}  mean {row['loss_average']:.4f}  "
            f"lr {row['learning_rate']:.1e}  {row['images_per_second']:.1f} img/s  "
            f"ETA {duration(row['eta_seconds'])}  "
            f"memory {gib(row['memory_bytes'])}, peak {gib(row['peak_bytes'])}{of}"
        )
        progress.update(task, completed=row["done"], total=row["total"], said=said)
    elif "validation" in row:
        progress.console.print(f"step {row['done']:5d}  {measured_line(row)}")
    elif "warning" in row:
        progress.console.print(f"warning: {row['warning']}", style="yellow", markup=False)
    elif row.get("event") in _SHOWN:
        facts = "  ".join(f"{name} {value}" for name, value in row.items() if name != "event")
        progress.console.print(f"{row['event']}  {facts}", style="dim", markup=False)


def show_arithmetic(numbers: dict[str, Any]) -> None:
    """The steps arithmetic in plain words."""
    each, there = numbers["images_per_step"], numbers["sd_scripts"]
    lines = Table.grid(padding=(0, 2))
    lines.add_row("images", f"{numbers['images']} ({numbers['bad_images']} bad, left out)")
    if len(numbers["sets"]) > 1:
        for number, one in enumerate(numbers["sets"]):
            lines.add_row(f"  set {number}", _of_set(one))
    lines.add_row("with repeats", f"{numbers['images_with_repeats']} an epoch")
    lines.add_row("buckets", _few(numbers["buckets"]))
    lines.add_row(
        "steps",
        f"{numbers['steps_per_epoch']} an epoch at {each} images a step, "
        "whatever the number of workers",
    )
    mixed = numbers["steps_per_epoch"] - numbers["steps_of_one_bucket"]
    lines.add_row(
        "", f"{numbers['steps_of_one_bucket']} of one bucket; {mixed} of what is left over of all"
    )
    lines.add_row("run", f"{numbers['steps']} steps = {numbers['epochs']} epochs")
    lines.add_row(
        "sd-scripts",
        f"with batch size {each}: {there['steps_per_epoch']} steps an epoch (each bucket's short "
        "batch is a step);",
    )
    lines.add_row(
        "",
        f"on 2 GPUs {there['steps_per_epoch_on_2_gpus']}, so {numbers['steps']} steps would be "
        f"{there['epochs_of_these_steps_on_2_gpus']} epochs. Steps here are of the whole fleet",
    )
    lines.add_row("held out", f"{numbers['held_out_images']} images")
    if numbers["tokens"]:
        lines.add_row("captions", _of_tokens(numbers["tokens"]))
    lines.add_row("cache", _of_cache(numbers["cache"]))
    encode = numbers["to_encode"]
    lines.add_row("to encode", f"{encode['images']} pictures, {encode['captions']} captions")
    console.print(lines)


def show_stock(stock: dict[str, Any]) -> None:
    """What is in a data set, in plain words."""
    lines = Table.grid(padding=(0, 2))
    for number, one in enumerate(stock["sets"]):
        lines.add_row(f"set {number}" if len(stock["sets"]) > 1 else "data", _of_set(one))
        out = [f"{one[word]} {said}" for word, said in _LEFT_OUT.items() if one[word]]
        if out:
            lines.add_row("", ", ".join(out))
    lines.add_row("showings", f"{stock['showings']} an epoch, with repeats")
    lines.add_row("buckets", _few(stock["buckets"]))
    if stock["pictures"]:
        lines.add_row("pictures", _of_pictures(stock["pictures"]))
        lines.add_row("captions", _of_captions(stock["captions"]))
        tags = stock["captions"]["most_frequent"]
        lines.add_row("tags", ", ".join(f"{tag}: {count}" for tag, count in tags.items()))
    for one in stock["bad"][:_NAMED]:
        lines.add_row("bad", f"{one['key']}: {one['reason']}")
    for key in stock["uncaptioned"][:_NAMED]:
        lines.add_row("no caption", key)
    console.print(lines)
    for note in stock["notes"]:
        console.print(f"note: {note}", style="yellow")


_NAMED = 10
_LEFT_OUT = {
    "bad": "bad, left out",
    "uncaptioned": "without a caption: training would refuse",
    "held_out": "held out",
}


def _of_pictures(pictures: dict[str, Any]) -> str:
    small, middle, large = (
        f"{w}x{h}" for w, h in (pictures[word] for word in ("smallest", "median", "largest"))
    )
    said = [f"{small} to {large}, middle {middle}"]
    if pictures["enlarged"]:
        most = pictures["enlarged_most"]
        said.append(f"{pictures['enlarged']} enlarged, at most {most:g} times")
    said.append(
        f"{pictures['cut_off_mean']:.1%} cut off on average, at most {pictures['cut_off_most']:.0%}"
    )
    if pictures["copies"]:
        said.append(f"{pictures['copies']} are copies of others")
    return "; ".join(said)


def _of_captions(captions: dict[str, Any]) -> str:
    empty = f", {captions['empty']} empty" if captions["empty"] else ""
    return f"{captions['different']} different{empty}; {captions['tags']} different tags"


def _of_set(one: dict[str, Any]) -> str:
    width, height = one["resolution"]
    kind = ", regularisation" if one["is_reg"] else ""
    shown = f"{one['images']} images, {one['showings']} showings"
    return f"{one['place']}: {shown} at {width}x{height}{kind}"


def _of_tokens(tokens: dict[str, Any]) -> str:
    read = "" if tokens["read"] is None else f"; {tokens['read']} are read"
    return f"the longest has {tokens['longest']} tokens ({tokens['image']}){read}"


def _of_cache(cache: dict[str, Any]) -> str:
    """V x bytes: what the variants of an image cost."""
    live = [word for word in ("pictures", "captions") if not cache[f"{word}_each"]]
    held = [
        f"{cache[word]} {word} of {kib(cache[f'{word[:-1]}_bytes'])}"
        + (f" (up to {cache[f'{word}_each']} an image)" if cache[f"{word}_each"] > 1 else "")
        for word in ("pictures", "captions")
        if word not in live
    ]
    encoded = [f"{' and '.join(live)} encoded as they are shown"] if live else []
    return ", ".join([*held, *encoded]) + (f": {mib(cache['bytes'])}" if held else "")


def _few(buckets: dict[str, int], most: int = 12) -> str:
    """Buckets with their counts; the fullest ones where there are many."""
    shown = sorted(buckets, key=lambda size: -buckets[size])[:most]
    listed = ", ".join(f"{size}: {buckets[size]}" for size in buckets if size in shown)
    return listed + (f", and {len(buckets) - most} more" if len(buckets) > most else "")


_WIDE = 140
"""Columns of a table in a pipe, where nothing says how many there are."""
_TRIED = 4
"""Settings that are told of those that fit, and of those that do not."""


def show_plan(document: dict[str, Any]) -> None:
    """What `raylora plan` found, in plain words and one table, on standard output."""
    out = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    width, height = document["bucket"]
    steps = "" if document["steps"] is None else f", {document['steps']:,} steps"
    out.print(
        f"{document['job']}: {document['family']} ({document['weights']}), largest bucket "
        f"{width}x{height}, {document['images_per_step']} images a step{steps}"
    )
    if document["note"]:
        out.print(
            f"note: {document['note']}; the bucket is that of data.resolution", style="yellow"
        )
    table = Table(title="predicted, not measured", title_justify="left", title_style="dim")
    # Narrow columns of figures: on a terminal of 80 columns the setting has what is left.
    for head in ("card", "setting", "peak of\nusable GiB", "at once\nx times", "s/step"):
        table.add_column(head, justify="left" if head in ("card", "setting") else "right")
    table.add_column("$ / 1,000\nsteps", justify="right")
    for plan in document["plans"]:
        _add_plan(table, plan, alone=len(document["plans"]) == 1)
    out.print(table)
    for plan in document["plans"]:
        for line in _plan_lines(plan):
            out.print(line, markup=False, soft_wrap=True)
    if "measured" in document:
        for line in _measured_lines(document["measured"]):
            out.print(line, markup=False, soft_wrap=True)


def _measured_lines(found: dict[str, Any]) -> Iterator[str]:
    """Two real steps beside what was predicted of them."""
    yield ""
    said = f"{found['setting']['micro_batch']} at once, {setting_words(found['setting'])}"
    yield f"measured on this machine's {found['card']}: {said}"
    peak, seconds = found["predicted_peak_bytes"], found["predicted_seconds_per_image"]
    of = "not predicted" if peak is None else f"predicted {gib(peak)}"
    yield f"  peak     {gib(found['observed_peak_bytes'])} in training, {of}"
    of = "not predicted" if seconds is None else f"predicted {seconds:.3f}"
    yield f"  seconds  {found['observed_seconds_per_image']:.3f} an image, {of}"


def _add_plan(table: Table, plan: dict[str, Any], *, alone: bool) -> None:
    """A row for each worker; a fleet's one precision is told below."""
    if plan["problem"]:
        table.add_row(", ".join(plan["cards"]), "does not fit", "", "", "", "")
    for worker in [] if plan["problem"] else plan["workers"]:
        cost = worker["dollars_per_1000_steps"]
        precision = "" if alone else f"{precision_words(plan['precision'])}; "
        together = f"{worker['micro_batch']} x {worker['accumulation']}"
        table.add_row(
            worker["card"],
            precision + setting_words(worker["setting"]),
            f"{max(worker['peaks'].values()) / GIB:.1f} of {worker['usable_bytes'] / GIB:.1f}",
            together if worker["images"] else "no image",
            f"{worker['seconds_per_step']:.2f}",
            "not known" if cost is None else f"{cost:.3f}",
        )


def _plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    """What a table has no room for: phases, where the weights lie, what was tried, the whole."""
    yield ""
    if plan["problem"]:
        yield f"{', '.join(plan['cards'])}: {plan['problem']}"
        return
    if plan["advice"]:
        yield f"{', '.join(dict.fromkeys(plan['cards']))} has no bfloat16: {plan['advice']}"
    for word in _up_to_taken(plan):
        yield f"precision  {precision_words(word)}: {word['why']}"
    seen = set()
    for worker in plan["workers"]:
        alike = (worker["card"], str(worker["setting"]))
        if alike not in seen:
            yield from _worker_lines(worker)
        seen.add(alike)
    idle = dict.fromkeys(one["card"] for one in plan["workers"] if not one["images"])
    if idle:
        yield (
            f"note: no image of a step is left for {', '.join(idle)}. Raise "
            "training.images_per_step, or leave it out."
        )
    yield _fleet_line(plan)


def _worker_lines(worker: dict[str, Any]) -> Iterator[str]:
    streamed = f", {gib(worker['streamed_bytes'])} streamed" if worker["streamed_bytes"] else ""
    yield f"{worker['card']}: {gib(worker['resident_bytes'])} of the base resident{streamed}"
    phases = ", ".join(f"{phase} {held / GIB:.2f}" for phase, held in worker["peaks"].items())
    yield f"  peaks    {phases} of {gib(worker['usable_bytes'])} usable"
    yield f"  host     {gib(worker['host_bytes'])} of {gib(worker['host_usable_bytes'])}"
    if worker["streamed_encoders"] or worker["tiled_previews"]:
        tiles = ["previews decoded in tiles"] if worker["tiled_previews"] else []
        streams = [f"{name} streamed while encoding" for name in worker["streamed_encoders"]]
        yield f"  also     {', '.join(streams + tiles)}"
    if worker["price"]:
        yield f"  price    {worker['dollars_per_hour']:.2f} dollars an hour ({worker['price']})"
    fits = [tried for tried in worker["candidates"] if tried["fits"]]
    misses = [tried for tried in worker["candidates"] if not tried["fits"]]
    for tried in (*fits[:_TRIED], *misses[:_TRIED]):
        said = f"{tried['setting']['micro_batch']} at once, {setting_words(tried['setting'])}"
        yield f"  tried    {said}: {tried['why']}"


def _up_to_taken(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Precisions from the best down to the one that is taken; nobody asks of the smaller ones."""
    for word in plan["precisions"]:
        yield word
        if all(plan["precision"][name] == word[name] for name in plan["precision"]):
            return


def _fleet_line(plan: dict[str, Any]) -> str:
    said = [f"{plan['steps_per_hour']:,.0f} steps an hour"]
    if len(plan["workers"]) > 1:
        said.insert(0, "images " + " + ".join(str(one["images"]) for one in plan["workers"]))
    if plan["eta_seconds"] is not None:
        said.append(f"{duration(plan['eta_seconds'])} in all")
    if plan["dollars_per_hour"] is None:
        unknown = [w["card"] for w in plan["workers"] if w["dollars_per_hour"] is None]
        said.append(f"no price is known for {', '.join(dict.fromkeys(unknown))} (see --prices)")
    else:
        said.append(f"{plan['dollars_per_hour']:.2f} dollars an hour")
    if plan["dollars"] is not None:
        said.append(f"{plan['dollars']:.2f} dollars in all")
    return ("fleet: " if len(plan["workers"]) > 1 else "run: ") + ", ".join(said)


def show_result(result: dict[str, Any], folder: str) -> None:
    """The closing summary: what was made, where, and what to try next."""
    lines = Table.grid(padding=(0, 2))
    again = " (was finished already)" if result.get("already_done") else ""
    early = f", {result['ended']}" if result["ended"].startswith("early") else ""
    lines.add_row("run", f"{result['name']}: {result['steps']} steps{early}{again}")
    if result["validation_first"] is not None:
        first, last = result["validation_first"], result["validation_last"]
        change = (last - first) / first * 100
        best, at = result["validation_best"], result["best_step"]
        lowest = f"; lowest {best:.4f} at step {at}" if at not in (None, result["steps"]) else ""
        lines.add_row("held-out loss", f"{first:.4f} -> {last:.4f} ({change:+.0f} %){lowest}")
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
