"""The loop around the step: what happens between steps, and how a run starts, resumes and ends."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from raylora.base.errors import TrainingError
from raylora.base.log import get_logger
from raylora.base.storage import Storage
from raylora.training.checkpoint import State, changed, read_newest
from raylora.training.course import Course, is_due
from raylora.training.fitting import told_in_words
from raylora.training.host_watch import HostWatch
from raylora.training.judge import Judge
from raylora.training.memory import DeviceMemory
from raylora.training.parts import Parts
from raylora.training.report import Reporter
from raylora.training.sample import Previews
from raylora.training.save import Saver
from raylora.training.shares import split
from raylora.training.state import copy_state_from_first, restore_state
from raylora.training.step import StepResult, train_step
from raylora.training.trial import Trial
from raylora.training.validate import Validation

log = get_logger("train")

_LOOKS_AT_HOST_EVERY = 10
_FREE = (
    "Free the device of other programs, raise memory.budget_gib where it is set, or choose a "
    "smaller data.resolution under another `name`."
)
MOST_SKIPPED = 10
"""Broken steps in a row that `training.on_nan: skip` passes over."""


@dataclass
class Run:
    """One worker's run: parts to train with, and what surrounds them.

    Attributes:
        storage: the run's folder.
        content: fingerprints of what is trained on (`checkpoint.CONTENT`); a resume with other
            images or another base is refused.
        reporter, saver: worker 0's; None on the others.
        memory: of this worker's device.
        trial: finds this worker's setting before the first step; None where nothing was planned.
    """

    parts: Parts
    course: Course
    storage: Storage
    content: Mapping[str, str]
    validation: Validation | None
    previews: Previews | None
    reporter: Reporter | None
    saver: Saver | None
    memory: DeviceMemory
    trial: Trial | None = None

    def close(self) -> None:
        """End helper threads and processes, and give back host memory, however the run ended."""
        self.parts.loader.close()
        self.parts.leave_host()
        if self.validation:
            self.validation.dataset.close()
        if self.saver:
            self.saver.close()
        if self.reporter:
            self.reporter.close()


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `steps` done, `stopped` when it was asked to leave before the end.

    One that ended early, since its held-out loss got no better, did not stop: it is finished.
    """

    steps: int
    stopped: bool
    validation: float | None


def run_training(run: Run) -> Outcome:
    """Train from the newest checkpoint, or from the start, to the end."""
    with run.memory.limited(), told_in_words("a part of the run that cannot be repeated", _FREE):
        return _train(run)


def _train(run: Run) -> Outcome:
    parts, course, judge = run.parts, run.course, Judge(run.course)
    done, looked = _resume(run, judge)
    if run.trial:
        run.trial.settle(parts)
    parts.loader.last_step = course.total_steps
    stopped, skipped = False, 0
    host = HostWatch()
    held_out: float | None = None
    with _stop_signal() as stop:
        if not looked:
            held_out = _look(run, judge, done)
        while done < course.total_steps and not stopped and not judge.over:
            result = train_step(parts, done, stop=stop.asked)
            _record(run, done, result)
            done += 1
            skipped = skipped + 1 if result.skipped else 0
            if skipped == MOST_SKIPPED:
                raise TrainingError(
                    f"the gradients of {skipped} steps in a row, up to step {done}, were not "
                    "finite, so training goes nowhere. Lower optimizer.learning_rate, or choose "
                    "training.precision: fp32, under another `name`."
                )
            stopped = result.stop and done < course.total_steps
            if is_due(done, _LOOKS_AT_HOST_EVERY):
                host.look(done, parts.fitting.tell)
            _keep_fleet(run, done, result)
            if not stopped:
                held_out = _look(run, judge, done, before=held_out)
            if stopped or course.saves_at(done) or judge.saves_at(done):
                _save(run, judge, done, looked=not stopped)
    _tell_end(run, judge, done, stopped=stopped)
    return Outcome(done, stopped, held_out)


def _resume(run: Run, judge: Judge) -> tuple[int, bool]:
    """Steps done, and whether what is looked at after them has been: one asked to stop does not."""
    state = read_newest(run.storage)
    newest = [row[0] for row in run.parts.group.gather([float(state.step if state else 0)])]
    if len(set(newest)) > 1:
        raise TrainingError(
            f"workers see different newest checkpoints ({newest}) in {run.storage.url}: the store "
            "must be one place for all of them. Use s3:// or a shared folder."
        )
    done = state.step if state else 0
    if run.reporter:
        run.reporter.begin(done, steps_per_epoch=run.parts.loader.plan.steps_per_epoch)
    if state is None:
        if run.parts.group.size > 1:
            copy_state_from_first(run.parts)
        return 0, False
    for word, fingerprint in run.content.items():
        if state.facts[word] != fingerprint:
            raise TrainingError(
                f"{changed(word, state.step)} So it cannot go on as if it had not stopped. Undo "
                "the change, or choose another `name`."
            )
    run.parts.fitting.again(partial(_take_up, run, state), "taking up the checkpoint")
    judge.restore(state.facts["judge"])
    weights = state.facts["shares"]
    if not run.parts.shares.pinned and len(weights) == run.parts.group.size:
        run.parts.shares.weights = list(weights)
    if run.reporter:
        run.reporter.event("resumed", step=done)
    return done, bool(state.facts["looked"])


def _take_up(run: Run, state: State) -> None:
    """Put a checkpoint's state where it belongs, and count what came."""
    budget, fitting = run.memory.budget, run.parts.fitting
    with budget.passed_over() if budget else nullcontext():
        restore_state(run.parts, state)
    fitting.apply(fitting.setting)


def _record(run: Run, step: int, result: StepResult) -> None:
    if run.reporter is None:
        return
    samples = run.parts.loader.plan.samples(step)
    run.reporter.step(
        step,
        result,
        samples=[f"{sample.number:016x}" for sample in samples],
        shares=[float(count) for count in split(result.images, run.parts.shares.weights)],
        keys=partial(_keys, run.parts, step),
    )


def _keys(parts: Parts, step: int) -> list[str]:
    loader = parts.loader
    return [loader.dataset.rows[sample.row].key for sample in loader.plan.samples(step)]


def _look(run: Run, judge: Judge, done: int, before: float | None = None) -> float | None:
    """Validate and draw previews where they are due; neither touches training's draws."""
    course, validation, previews = run.course, run.validation, run.previews
    held_out = before
    with _apart(run):
        if validation and course.validates_at(done):
            run.parts.graphs.make_room()
            with run.parts.shown():
                held_out = _measure(run, validation, judge, done)
        if previews and (judge.over or course.previews_at(done)):
            run.parts.graphs.drop()  # whoever lends models takes what recordings hold for free
            with run.parts.shown():
                left_out = previews.draw(run.parts, done)
            if left_out and run.reporter:
                run.reporter.event("previews left out", step=done, out_of_memory=left_out)
    return held_out


@contextmanager
def _apart(run: Run) -> Iterator[None]:
    """Within it, the clock of training stands."""
    go_on = run.reporter.pause() if run.reporter else None
    yield
    if go_on:
        go_on()


def _measure(run: Run, validation: Validation, judge: Judge, done: int) -> float:
    numbers = validation.measure(run.parts)
    warned = judge.take(done, numbers)
    if run.reporter:
        run.reporter.measured(done, numbers)
        if warned:
            run.reporter.event("overfitting", **warned.facts())
    return numbers["validation"]


def _keep_fleet(run: Run, done: int, result: StepResult) -> None:
    """Follow the workers' speeds, and notice when their adapters are no longer the same bits."""
    parts, course = run.parts, run.course
    if parts.group.size == 1:
        return
    parts.shares.note(result.my_images, result.my_seconds)
    if is_due(done, course.refit_every) and not parts.shares.pinned:
        speeds = [row[0] for row in parts.group.gather([parts.shares.take_speed()])]
        if parts.shares.refit(speeds) and run.reporter:
            run.reporter.event(
                "shares", step=done, weights=[round(w, 3) for w in parts.shares.weights]
            )
    if is_due(done, course.checksum_every):
        sums = {row[0] for row in parts.group.gather([_checksum(parts)])}
        if len(sums) > 1:
            copy_state_from_first(parts)
            if run.reporter:
                run.reporter.event("drift mended", step=done)


def _save(run: Run, judge: Judge, done: int, *, looked: bool) -> None:
    with _apart(run):
        if run.reporter:
            # Rows first: a checkpoint that exists has its metrics beside it, and none is NaN.
            run.reporter.flush()
        run.parts.graphs.make_room()
        if not run.parts.fitting.again(partial(_is_finite, run.parts), "saving"):
            raise TrainingError(
                f"the adapter holds NaN or infinity after step {done}, so this checkpoint is not "
                "saved. Lower optimizer.learning_rate, and start under another `name`; the newest "
                "checkpoint is from before."
            )
        if run.saver and run.reporter:
            facts: dict[str, Any] = {
                **run.content,
                "shares": run.parts.shares.weights,
                "looked": looked,
                "judge": judge.facts(),
                "keep": judge.keep,
            }
            proof = run.saver.save(run.parts, done, facts)
            proven = {"proof_error": float(f"{proof.worst_error:.2e}")} if proof else {}
            run.reporter.event("saved", step=done, **proven)


def _is_finite(parts: Parts) -> bool:
    return bool(torch.isfinite(parts.adapter.values).all())


def _tell_end(run: Run, judge: Judge, done: int, *, stopped: bool) -> None:
    if run.reporter is None:
        return
    if judge.over and done < run.course.total_steps:
        best = {"best_step": judge.best.step, "best": judge.best.loss}
        run.reporter.event("early stop", step=done, measurements=judge.best.waited, **best)
    else:
        run.reporter.event("stopped" if stopped else "trained", step=done)
    run.reporter.flush()


def _checksum(parts: Parts) -> float:
    """48 bits of the adapter's hash, which a float64 carries exactly."""
    values = parts.adapter.values.detach().cpu().numpy()
    return float(int.from_bytes(hashlib.blake2b(values.data, digest_size=6).digest(), "big"))


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
