"""A sweep campaign: every trial's job, checked before anything runs, and the leaderboard it leaves.

<store>/campaigns/<name>/space.yaml         what was asked
<store>/campaigns/<name>/leaderboard.json   best first
<store>/runs/<name>-<number>/               each trial is a run like any other
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raylora.base.errors import JobError, MissingObject, UserError
from raylora.base.lookup import did_you_mean
from raylora.base.storage import Storage, open_storage
from raylora.job import Job, load_job, with_overrides
from raylora.sweep import SweepOptions, Values, load_sweep
from raylora.training.checkpoint import checkpoint_steps
from raylora.training.report import read_metrics


@dataclass(frozen=True)
class Trial:
    """One job of the campaign, and what sets it apart."""

    number: int
    values: Values
    job: Job

    @property
    def storage(self) -> Storage:
        """The run's folder in the store."""
        return open_storage(self.job.store).within(self.job.run_folder)


@dataclass(frozen=True)
class Campaign:
    """A checked search space.

    Attributes:
        job: the job that is varied, as its file and `--set` give it.
    """

    options: SweepOptions
    job: Job
    trials: tuple[Trial, ...]

    @property
    def storage(self) -> Storage:
        """The campaign's folder in the store."""
        return open_storage(self.job.store).within(f"campaigns/{self.options.name}")

    def fingerprint(self) -> str:
        """16 hex digits that name all its trials' jobs."""
        text = "".join(trial.job.fingerprint() for trial in self.trials)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_campaign(
    path: str | Path, overrides: Sequence[str] = (), *, job: str | None = None
) -> Campaign:
    """Read a search space and its job, and make every trial's job.

    Args:
        path: the search space file.
        overrides: `a.b=value` each, for the job; they win over `every_trial`.
        job: another job file than the one the space names.

    Raises:
        JobError: every path and value that cannot work, one sentence each.
    """
    options = load_sweep(path, job=job)
    stored = [f"store={options.store}"] if options.store else []
    base = load_job(options.job, [*stored, *overrides])
    given = [override.partition("=")[0] for override in overrides]
    shared = _shared_job(options, base, given)
    return Campaign(options, base, _make_trials(options, shared))


def best_job(campaign: Campaign, overrides: Sequence[str] = ()) -> str:
    """The job file with the winner's values in it, as YAML; ready for `raylora train`.

    Raises:
        UserError: the campaign has no winner yet.
    """
    board = read_leaderboard(campaign)
    winner = board["trials"][0] if board else None
    if winner is None or winner["adapter"] is None:
        raise UserError(
            f"The campaign {campaign.options.name!r} in {campaign.storage.url} has no winner yet. "
            "Run `raylora tune` without --apply first."
        )
    name = f"{campaign.options.name}-best"
    won = {**winner["values"], "name": name, "store": campaign.job.store}
    # Through YAML and back, so that the file holds what was written and not every default.
    applied = [f"{path}={yaml.safe_dump(value)}" for path, value in won.items()]
    job = load_job(campaign.options.job, [*overrides, *applied])
    plain = job.model_dump(mode="json", exclude_unset=True)
    return (
        f"# {winner['trial']} of the campaign {campaign.options.name}: held-out loss "
        f"{winner['validation']:.4f} after {winner['steps']} steps.\n"
        + yaml.safe_dump(plain, sort_keys=False)
    )


def measurements(storage: Storage) -> list[tuple[int, float]]:
    """(step, held-out loss) of a run as far as its newest checkpoint, which is as far as it got."""
    newest = max(checkpoint_steps(storage), default=0)
    return [
        (row["done"], row["validation"])
        for row in read_metrics(storage)
        if "validation" in row and row["done"] <= newest
    ]


def read_leaderboard(campaign: Campaign) -> dict[str, Any] | None:
    """leaderboard.json of the campaign's name; None when there is none."""
    try:
        board: dict[str, Any] = json.loads(campaign.storage.read("leaderboard.json"))
    except MissingObject:
        return None
    return board


def finished_leaderboard(campaign: Campaign) -> dict[str, Any] | None:
    """The leaderboard, if this very campaign has nothing left to do."""
    board = read_leaderboard(campaign)
    if board and board["finished"] and board["fingerprint"] == campaign.fingerprint():
        return {**board, "already_done": True}
    return None


def write_space(campaign: Campaign) -> None:
    """Keep what was asked beside what came of it."""
    text = yaml.safe_dump(
        campaign.options.model_dump(mode="json", exclude_unset=True), sort_keys=False
    )
    campaign.storage.write("space.yaml", text.encode())


def write_leaderboard(campaign: Campaign, board: Mapping[str, Any]) -> None:
    """Put leaderboard.json in place of any earlier one."""
    campaign.storage.write("leaderboard.json", json.dumps(board, indent=1).encode())


def make_leaderboard(
    campaign: Campaign, *, stopped: Collection[int], errors: Mapping[int, str]
) -> dict[str, Any]:
    """Rank the trials by their last held-out loss.

    Args:
        stopped: numbers of the trials that the scheduler gave up.
        errors: what ended others, by number.
    """
    rows = [
        _row(trial, stopped=trial.number in stopped, error=errors.get(trial.number))
        for trial in campaign.trials
    ]
    rows.sort(key=_rank)
    return {
        "campaign": campaign.options.name,
        "fingerprint": campaign.fingerprint(),
        "metric": "held-out loss",
        "finished": all(row["state"] in ("finished", "stopped early") for row in rows),
        "proof": None,
        "trials": rows,
    }


def _shared_job(options: SweepOptions, base: Job, given: Sequence[str]) -> Job:
    """The job of all trials, before their own values; JobError says what cannot work."""
    problems = [
        f"{place}.{path}: {wrong}"
        for place, paths in (("space", options.space), ("every_trial", options.every_trial))
        for path in paths
        if (wrong := _unknown(base, path))
    ]
    problems += [
        f"space.{path} is swept, so --set cannot set it. Take it out of one of them."
        for path in options.space
        if path in given
    ]
    if problems:
        raise JobError(problems)
    alike = {path: value for path, value in options.every_trial.items() if path not in given}
    shared = with_overrides(base, {**alike, "name": f"{options.name}-000"})
    if shared.validation.folder is None:
        problems.append(
            "metric: validation compares trials on held-out images, and the job has no "
            "validation.folder. Set one, in the job or with --set validation.folder=FOLDER."
        )
    steps = shared.training.steps
    if options.scheduler == "asha" and steps is not None and options.grace_steps > steps:
        problems.append(grace_problem(options.grace_steps, steps))
    if shared.validation.patience is not None:
        problems.append(
            "validation.patience ends a run by its own measurements, and a sweep compares trials "
            "at equal steps. Leave it out; scheduler: asha stops what is behind."
        )
    if shared.training.seed is None:
        problems.append(
            "training.seed is null, and trials with seeds of their own cannot be compared. Give "
            "one, in the job or with --set training.seed=0."
        )
    if problems:
        raise JobError(problems)
    every = shared.validation.every_steps
    own: Values = {
        "fleet.workers": 1,
        "fleet.shares": "measured",
        # Every measurement has its checkpoint, so the scheduler may stop a trial after any.
        "training.save_every_steps": every,
        "training.save_every_epochs": shared.validation.every_epochs,
        "training.keep_last": shared.training.keep_last or 2,
    }
    return with_overrides(shared, own if options.previews else {**own, "preview.prompts": []})


def grace_problem(grace_steps: int, steps: int) -> str:
    """The sentence for a scheduler that could never act."""
    return (
        f"grace_steps is {grace_steps}, and a trial has {steps} steps: asha could stop none. "
        f"Lower it, or write scheduler: none."
    )


def _make_trials(options: SweepOptions, shared: Job) -> tuple[Trial, ...]:
    trials, problems = [], []
    for number, values in enumerate(options.trials()):
        try:
            job = with_overrides(shared, {**values, "name": f"{options.name}-{number:03d}"})
        except JobError as error:
            problems += [_blamed(problem, values) for problem in error.problems]
            continue
        trials.append(Trial(number, values, job))
    if problems:
        raise JobError(list(dict.fromkeys(problems)))
    return tuple(trials)


def _blamed(problem: str, values: Values) -> str:
    """The problem with the swept value it speaks of; with all of them when it names none."""
    named = [path for path in values if path in problem] or list(values)
    return "space: " + ", ".join(f"{path} {values[path]!r}" for path in named) + f": {problem}"


def _unknown(job: Job, path: str) -> str:
    """What is wrong with a dotted path of the job; '' when it is there."""
    place: Any = job.plain()
    for word in path.split("."):
        if not isinstance(place, dict):
            return f"the job has no such option: {word!r} would be inside a value."
        if word not in place:
            return f"the job has no such option.{did_you_mean(word, place)}"
        place = place[word]
    return ""


def _row(trial: Trial, *, stopped: bool, error: str | None) -> dict[str, Any]:
    run, measured = trial.storage, measurements(trial.storage)
    step, loss = measured[-1] if measured else (0, None)
    finished = run.entry("result.json") is not None
    name = f"{trial.job.name}.safetensors"
    if not finished:
        name = f"checkpoints/{step:06d}/adapter.safetensors"
    return {
        "trial": trial.job.name,
        "values": trial.values,
        "validation": loss,
        "steps": step,
        "total_steps": trial.job.training.steps,
        "state": _state(finished, error, stopped),
        "error": error,
        "adapter": f"{run.url}/{name}" if step else None,
    }


def _state(finished: bool, error: str | None, stopped: bool) -> str:
    if finished:
        return "finished"
    if error:
        return "failed"
    return "stopped early" if stopped else "unfinished"


def _rank(row: dict[str, Any]) -> tuple[float, str]:
    """Lowest loss first; what has no adapter, or a loss that is no number, comes last."""
    loss = row["validation"] if row["adapter"] else None
    known = loss if loss is not None and math.isfinite(loss) else math.inf
    return float(known), row["trial"]
