"""The loop around the step: what happens between steps, and how a run starts, resumes and ends."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from raylora.base.errors import TrainingError
from raylora.base.log import get_logger
from raylora.base.storage import Storage
from raylora.training.checkpoint import changed, optimizer_tensors, read_newest, restore
from raylora.training.parts import Parts
from raylora.training.report import Reporter
from raylora.training.sample import Previews
from raylora.training.save import Saver
from raylora.training.shares import split
from raylora.training.step import StepResult, train_step
from raylora.training.validate import Validation

log = get_logger("train")


@dataclass(frozen=True)
class Course:
    """When things happen, in global steps; None is never (but at the end)."""

    total_steps: int
    save_every: int | None
    validate_every: int
    preview_every: int
    refit_every: int
    checksum_every: int


@dataclass
class Run:
    """One worker's run: parts to train with, and what surrounds them.

    Attributes:
        storage: the run's folder.
        content: fingerprints of what is trained on (`checkpoint.CONTENT`); a resume with other
            images or another base is refused.
        reporter, saver: worker 0's; None on the others.
    """

    parts: Parts
    course: Course
    storage: Storage
    content: Mapping[str, str]
    validation: Validation | None
    previews: Previews | None
    reporter: Reporter | None
    saver: Saver | None

    def close(self) -> None:
        """End helper threads and processes, however the run ended."""
        self.parts.loader.close()
        if self.validation:
            self.validation.dataset.close()
        if self.saver:
            self.saver.close()


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `steps` done, `stopped` when it was asked to leave before the end."""

    steps: int
    stopped: bool
    validation: float | None


def run_training(run: Run) -> Outcome:
    """Train from the newest checkpoint, or from the start, to the end."""
    parts, course = run.parts, run.course
    done, looked = _resume(run)
    parts.loader.last_step = course.total_steps
    stopped = False
    held_out: float | None = None
    with _stop_signal() as stop:
        if not looked:
            held_out = _look(run, done)
        while done < course.total_steps and not stopped:
            result = train_step(parts, done, stop=stop.asked)
            _record(run, done, result)
            done += 1
            stopped = result.stop and done < course.total_steps
            _keep_fleet(run, done, result)
            if not stopped:
                held_out = _look(run, done, before=held_out)
            if stopped or done == course.total_steps or _due(done, course.save_every):
                _save(run, done, looked=not stopped)
    if run.reporter:
        run.reporter.event("stopped" if stopped else "trained", step=done)
        run.reporter.flush()
    return Outcome(done, stopped, held_out)


def _resume(run: Run) -> tuple[int, bool]:
    """Steps done, and whether what is looked at after them has been: one asked to stop does not."""
    state = read_newest(run.storage)
    newest = [row[0] for row in run.parts.group.gather([float(state.step if state else 0)])]
    if len(set(newest)) > 1:
        raise TrainingError(
            f"workers see different newest checkpoints ({newest}) in {run.storage.url}: the store "
            "must be one place for all of them. Use s3:// or a shared folder."
        )
    if state is None:
        run.parts.group.copy_from_first(run.parts.adapter.values.data)
        return 0, False
    for word, fingerprint in run.content.items():
        if state.facts[word] != fingerprint:
            raise TrainingError(
                f"{changed(word, state.step)} So it cannot go on as if it had not stopped. Undo "
                "the change, or choose another `name`."
            )
    restore(run.parts.adapter.values, run.parts.optimizer, state.tensors)
    weights = state.facts["shares"]
    if not run.parts.shares.pinned and len(weights) == run.parts.group.size:
        run.parts.shares.weights = list(weights)
    if run.reporter:
        run.reporter.event("resumed", step=state.step)
    return state.step, bool(state.facts["looked"])


def _record(run: Run, step: int, result: StepResult) -> None:
    if run.reporter is None:
        return
    parts = run.parts
    run.reporter.step(
        step,
        result,
        learning_rate=parts.learning_rate * parts.factor(step),
        samples=[f"{sample.number:016x}" for sample in parts.loader.plan.samples(step)],
        shares=[float(count) for count in split(result.images, parts.shares.weights)],
    )


def _look(run: Run, done: int, before: float | None = None) -> float | None:
    """Validate and draw previews where they are due; neither touches training's draws."""
    course = run.course
    ends = done in (0, course.total_steps)
    go_on = run.reporter.pause() if run.reporter else None
    held_out = before
    if run.validation and (ends or _due(done, course.validate_every)):
        numbers = run.validation.measure(run.parts)
        held_out = numbers["validation"]
        if run.reporter:
            run.reporter.measured(done, numbers)
    if run.previews and (ends or _due(done, course.preview_every)):
        left_out = run.previews.draw(run.parts, done)
        if left_out and run.reporter:
            run.reporter.event("previews left out", step=done, out_of_memory=left_out)
    if go_on:
        go_on()
    return held_out


def _keep_fleet(run: Run, done: int, result: StepResult) -> None:
    """Follow the workers' speeds, and notice when their adapters are no longer the same bits."""
    parts, course = run.parts, run.course
    if parts.group.size == 1:
        return
    parts.shares.note(result.my_images, result.my_seconds)
    if _due(done, course.refit_every) and not parts.shares.pinned:
        speeds = [row[0] for row in parts.group.gather([parts.shares.take_speed()])]
        if parts.shares.refit(speeds) and run.reporter:
            run.reporter.event(
                "shares", step=done, weights=[round(w, 3) for w in parts.shares.weights]
            )
    if _due(done, course.checksum_every):
        sums = {row[0] for row in parts.group.gather([_checksum(parts)])}
        if len(sums) > 1:
            parts.group.copy_from_first(parts.adapter.values.data)
            for tensor in optimizer_tensors(parts.optimizer).values():
                parts.group.copy_from_first(tensor)
            if run.reporter:
                run.reporter.event("drift mended", step=done)


def _save(run: Run, done: int, *, looked: bool) -> None:
    if not bool(torch.isfinite(run.parts.adapter.values).all()):
        raise TrainingError(
            f"the adapter holds NaN or infinity after step {done}, so this checkpoint is not "
            "saved. Lower optimizer.learning_rate, and start under another `name`; the newest "
            "checkpoint is from before."
        )
    go_on = run.reporter.pause() if run.reporter else None
    if run.saver and run.reporter:
        # Rows first: a checkpoint that exists has its metrics beside it.
        run.reporter.flush()
        facts: dict[str, Any] = {
            **run.content,
            "shares": run.parts.shares.weights,
            "looked": looked,
        }
        proof = run.saver.save(run.parts, done, facts)
        proven = {"proof_error": float(f"{proof.worst_error:.2e}")} if proof else {}
        run.reporter.event("saved", step=done, **proven)
    if go_on:
        go_on()


def _checksum(parts: Parts) -> float:
    """48 bits of the adapter's hash, which a float64 carries exactly."""
    raw = parts.adapter.values.detach().cpu().numpy().tobytes()
    return float(int.from_bytes(hashlib.blake2b(raw, digest_size=6).digest(), "big"))


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


class _Stop:
    asked = False


@contextmanager
def _stop_signal() -> Iterator[_Stop]:
    """SIGTERM asks to save and leave after the step; only where this is the main thread."""
    stop = _Stop()

    def ask(number: int, frame: object) -> None:
        stop.asked = True

    try:
        before = signal.signal(signal.SIGTERM, ask)
    except ValueError:  # not the main thread: whoever runs it stops it some other way
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
