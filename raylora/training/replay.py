"""Computing a recorded step again, to look at what was in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raylora.base.errors import JobError, TrainingError
from raylora.training.checkpoint import checkpoint_steps, read_checkpoint
from raylora.training.loop import Run
from raylora.training.report import read_metrics
from raylora.training.state import restore_state
from raylora.training.step import train_step


@dataclass(frozen=True)
class Replay:
    """A step as it was recorded and as it came out again.

    Attributes:
        step: counted from 1, as in the metrics: the step that made `step` steps done.
        keys: the images of the step, in order.
        recorded, replayed: the loss; equal where shares and machine are the same.
    """

    step: int
    keys: list[str]
    recorded: float
    replayed: float


def replay_step(run: Run, step: int) -> Replay:
    """Go from the newest checkpoint before a step through it, changing nothing in storage.

    Raises:
        JobError: the run has no record of the step.
        TrainingError: the data set no longer gives the samples that were recorded.
    """
    rows = {row["done"]: row for row in read_metrics(run.storage) if "loss" in row}
    if step not in rows:
        held = f"steps {min(rows)} to {max(rows)}" if rows else "no steps"
        raise JobError(f"step {step} is not recorded: the run has {held}.")
    before = [saved for saved in checkpoint_steps(run.storage) if saved < step]
    parts, done = run.parts, 0
    if before:
        state = read_checkpoint(run.storage, before[-1])
        restore_state(parts, state)
        done = state.step
    result = None
    samples = parts.loader.plan.samples(step - 1)
    if [f"{sample.number:016x}" for sample in samples] != rows[step]["samples"]:
        raise TrainingError(
            f"step {step}: the data set now gives other samples than were recorded; images, "
            "repeats or data.order_seed changed since."
        )
    # As recorded, and not by the job's schedule: after --extend that has another end.
    if parts.mover.rates is not None:
        recorded = {number: list(row["rates"].values()) for number, row in rows.items()}
        parts.mover = replace(parts.mover, rates=lambda number: recorded[number + 1])
    for number in range(done, step):
        result = train_step(parts, number)
    assert result is not None
    keys = [parts.loader.dataset.rows[sample.row].key for sample in samples]
    return Replay(step, keys, rows[step]["loss"], float(result.loss))
