"""The road without Ray: check, cache, train and finish a job in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raylora.assemble import (
    Datasets,
    claim,
    finish,
    load_datasets,
    make_run,
    pick_device,
    settle,
)
from raylora.base.errors import TrainingError
from raylora.base.storage import Storage
from raylora.check import Checked, check_job
from raylora.data.dataset import BalanceChanged
from raylora.encoding import Encoding
from raylora.job import Job
from raylora.training.loop import Outcome, run_training
from raylora.training.reduce import Alone
from raylora.training.report import Sink


def train(
    job: Job,
    *,
    extend: bool = False,
    moved: bool = False,
    rehash: bool = False,
    sinks: Sequence[Sink] = (),
    prove: bool = True,
) -> dict[str, Any]:
    """Run a job in this process. The same call resumes.

    Args:
        extend: go on past the end of a finished run whose job now asks for more steps.
        moved: images or base lie elsewhere than before; their content is compared.
        rehash: read every source image again, whatever its size and date say.
        sinks: told every progress row.
        prove: read each saved file back with diffusers; off only to measure speed.

    Returns:
        The content of result.json.

    Raises:
        UserError: the job cannot run; nothing was trained.
        TrainingError: the run stopped; what was saved stays good.
    """
    checked = check_job(job, rehash=rehash)
    return train_checked(checked, extend=extend, moved=moved, sinks=sinks, prove=prove)


def train_checked(
    checked: Checked,
    *,
    extend: bool = False,
    moved: bool = False,
    sinks: Sequence[Sink] = (),
    prove: bool = True,
) -> dict[str, Any]:
    """`train` for a job that was checked already."""
    job = checked.job
    begun = begin(checked, cache_here, extend=extend, moved=moved)
    if isinstance(begun, dict):
        return begun
    storage, datasets = begun
    device = pick_device(job)
    run = make_run(job, checked.family, datasets, storage, Alone(), device, sinks, prove=prove)
    try:
        outcome = run_training(run)
    finally:
        run.close()
    refuse_stopped(outcome)
    return finish(job, storage)


def begin(
    checked: Checked, prepare: Callable[[Checked], Datasets], *, extend: bool, moved: bool
) -> tuple[Storage, Datasets] | dict[str, Any]:
    """What comes before training on every road: the run's name, the cache, a move.

    Args:
        prepare: encodes what the cache lacks, and loads the rows.

    Returns:
        (the run's folder, what is trained on), or result.json where nothing is left to do.
    """
    storage, done = claim(checked.job, extend=extend, moved=moved)
    if done is not None and not moved:
        return done
    try:
        datasets = prepare(checked)
    except BalanceChanged:
        datasets = prepare(check_job(checked.job))
    settle(checked.job, storage, checked.family, datasets)
    return done or (storage, datasets)


def cache_here(checked: Checked) -> Datasets:
    """Encode what is missing in this process; the encoders are loaded only if something is."""
    work = [(plan.facts, item) for plan in checked.plans for item in plan.items]
    encoding = Encoding(checked.job, checked.family, pick_device(checked.job))
    try:
        for facts, item in sorted(work, key=lambda one: one[1].kind):
            encoding.run(facts, item)
    finally:
        encoding.close()
    return load_datasets(checked.plans)


def refuse_stopped(outcome: Outcome) -> None:
    """A run that was asked to leave is no finished run."""
    if outcome.stopped:
        raise TrainingError(
            f"stopped at step {outcome.steps} as asked; the same command goes on from there."
        )
