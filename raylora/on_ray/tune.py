"""Ray Tune: a campaign's trials side by side, one process each, over one cache.

Ray decides where a trial runs and when it is too far behind. All else is ours: the values were
drawn and checked before, a trial is a run of the store like any other, and what it measured is read
from there. So a campaign that was killed goes on by the same command, without Ray's own records.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.schedulers import ASHAScheduler

from raylora.assemble import Datasets, claim
from raylora.base.errors import JobError, RayloraError, TrainingError, UserError
from raylora.base.log import get_logger
from raylora.campaign import (
    Campaign,
    Trial,
    grace_problem,
    make_leaderboard,
    write_leaderboard,
    write_space,
)
from raylora.check import Checked, base_problems, check_job
from raylora.job import Job, with_overrides
from raylora.on_ray.cache import prepare_on_ray
from raylora.on_ray.trial import prove_trial, run_trial, trial_steps

log = get_logger("tune")

GPU_KIND = "ray.io/accelerator-type"
# Tune's own tables on standard output, and its files of results.
QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}


def run_campaign(campaign: Campaign) -> dict[str, Any]:
    """Run what is left of a campaign on the connected cluster.

    Returns:
        The content of leaderboard.json.

    Raises:
        UserError: a trial's job cannot run, or no node can hold a trial.
        TrainingError: every trial failed, or the campaign was interrupted.
        ExportError: the winner's file does not hold what was trained.
    """
    room = _room(campaign)
    checked = _check(campaign)
    _claim(campaign)
    write_space(campaign)
    datasets = {}
    for one, trials in checked:
        shared = prepare_on_ray(one)
        datasets.update({trial.number: shared for trial in trials})
    watcher = _Watcher(campaign)
    _fit(campaign, datasets, min(campaign.options.max_concurrent or room, room), watcher)
    board = make_leaderboard(campaign, stopped=watcher.stopped, errors=watcher.errors)
    write_leaderboard(campaign, board)
    if any(row["state"] == "unfinished" for row in board["trials"]):
        raise TrainingError("The campaign was interrupted; the same command goes on from there.")
    winner = board["trials"][0]
    if winner["adapter"] is None:
        raise TrainingError(f"Every trial failed. {winner['trial']}: {winner['error']}")
    board["proof"] = _prove(campaign, winner["trial"])
    write_leaderboard(campaign, board)
    return board


class _Watcher(tune.Callback):  # type: ignore[misc]
    """Says on the driver how the trials go, and remembers how each ended."""

    def __init__(self, campaign: Campaign) -> None:
        self.stopped: set[int] = set()
        self.errors: dict[int, str] = {}
        self._names = [trial.job.name for trial in campaign.trials]

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial measured its held-out loss, or failed."""
        number = trial.config["trial"]
        if "error" in result:
            self._failed(number, result["error"])
        elif "again" not in result:
            step, loss = result["step"], result["validation"]
            log.info("%s  step %5d  held-out loss %.4f", self._names[number], step, loss)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial left: by itself, or because the scheduler told it to."""
        number = trial.config["trial"]
        if number not in self.errors:
            self.stopped.add(number)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died; Tune starts another."""
        name = self._names[trial.config["trial"]]
        log.warning("%s: its process died; it goes on from its newest checkpoint", name)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died, more often than fleet.max_failures allows."""
        said = str(trial.get_error() or "").strip().splitlines()
        self._failed(trial.config["trial"], said[-1] if said else "its process died")

    def _failed(self, number: int, error: str) -> None:
        self.errors[number] = error
        log.error("%s failed: %s", self._names[number], error)


def _check(campaign: Campaign) -> list[tuple[Checked, list[Trial]]]:
    """Each distinct data set once, checked, with the trials that share it."""
    sharing: dict[str, list[Trial]] = defaultdict(list)
    for trial in campaign.trials:
        plain = trial.job.plain()
        sharing[json.dumps([plain[word] for word in ("family", "data", "validation")])] += [trial]
    fleet, problems, found = campaign.job.plain()["fleet"], [], []
    for trials in sharing.values():
        try:
            # The cache is made by the whole fleet, whatever a trial runs on.
            checked = check_job(with_overrides(trials[0].job, {"fleet": fleet}))
        except JobError as error:
            problems += error.problems
            continue
        for trial in trials[1:]:
            problems += base_problems(trial.job, checked.family)
        found.append((checked, trials))
    if problems:
        raise JobError(list(dict.fromkeys(problems)))
    return found


def _claim(campaign: Campaign) -> None:
    """Take every trial's run name before any of them runs."""
    problems = []
    for trial in campaign.trials:
        try:
            claim(trial.job, extend=False)
        except JobError as error:
            problems += error.problems
    if problems:
        raise JobError(problems)


def _fit(
    campaign: Campaign, datasets: Mapping[int, Datasets], at_once: int, watcher: _Watcher
) -> None:
    """Let Tune run the trials; returns when none is left, or at Ctrl-C."""
    numbers = [trial.number for trial in campaign.trials]
    log.info("%s: %d trials, %d at once", campaign.options.name, len(numbers), at_once)
    # The watcher says in a line what Tune would say in a page.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    trainable = tune.with_parameters(
        run_trial, campaign=campaign, datasets=datasets, folder=os.getcwd()
    )
    failures = campaign.job.fleet.max_failures
    with tempfile.TemporaryDirectory(prefix="raylora-tune-") as scratch:
        tune.Tuner(
            tune.with_resources(trainable, _placement(campaign)),
            param_space={"trial": tune.grid_search(numbers)},
            tune_config=tune.TuneConfig(
                scheduler=_scheduler(campaign, datasets), max_concurrent_trials=at_once
            ),
            run_config=tune.RunConfig(
                name=campaign.options.name,
                # Only Ray's own records: no checkpoint of a trial goes through Ray.
                storage_path=scratch,
                callbacks=[watcher],
                failure_config=tune.FailureConfig(max_failures=failures),
                verbose=0,
            ),
        ).fit()


def _scheduler(campaign: Campaign, datasets: Mapping[int, Datasets]) -> Any:
    options = campaign.options
    if options.scheduler == "none":
        return None
    longest = max(trial_steps(trial.job, datasets[trial.number]) for trial in campaign.trials)
    if options.grace_steps > longest:
        raise JobError(grace_problem(options.grace_steps, longest))
    return ASHAScheduler(
        time_attr="step",
        metric="validation",
        mode="min",
        max_t=longest,
        grace_period=options.grace_steps,
        reduction_factor=options.reduction_factor,
        stop_last_trials=False,
    )


def _needs(job: Job) -> dict[str, float]:
    """What one trial takes of a node."""
    needs = {"CPU": job.fleet.cpus_per_worker}
    return needs if job.fleet.cpus_only else {**needs, "GPU": 1}


def _kinds(job: Job) -> list[str]:
    """GPU kinds that trials may run on; [] is any."""
    workers = job.fleet.workers
    kinds = [None] if isinstance(workers, int) else [kind.gpu for kind in workers]
    return sorted({kind for kind in kinds if kind}) if all(kinds) else []


def _placement(campaign: Campaign) -> tune.PlacementGroupFactory:
    job, kinds = campaign.trials[0].job, _kinds(campaign.job)
    selector = {"bundle_label_selector": [{GPU_KIND: f"in({','.join(kinds)})"}]} if kinds else {}
    return tune.PlacementGroupFactory([_needs(job)], **selector)


def _room(campaign: Campaign) -> int:
    """How many trials the cluster's nodes hold at once; a trial that fits none would wait for ever.

    Raises:
        UserError: no node can hold one.
    """
    needs, kinds = _needs(campaign.trials[0].job), _kinds(campaign.job)
    room = 0
    for node in ray.nodes():
        if node["Alive"] and (not kinds or node["Labels"].get(GPU_KIND) in kinds):
            free = node["Resources"]
            room += int(min(free.get(word, 0) // amount for word, amount in needs.items()))
    if room < 1:
        asked = " and ".join(f"{amount:g} {word}" for word, amount in needs.items())
        named = f" of kind {' or '.join(kinds)}" if kinds else ""
        raise UserError(
            f"No node of the cluster has {asked}{named}, which one trial needs. Change "
            "fleet.workers or fleet.cpus_per_worker, or set fleet.cpus_only=true to train on CPUs."
        )
    return room


def _prove(campaign: Campaign, name: str) -> dict[str, Any]:
    """Prove the winner's file on the cluster, where memory for the base is."""
    trial = next(trial for trial in campaign.trials if trial.job.name == name)
    task = ray.remote(prove_trial).options(num_cpus=trial.job.fleet.cpus_per_worker)
    try:
        proof: dict[str, Any] = ray.get(task.remote(trial, os.getcwd()))
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, RayloraError) else error) from None
    return proof
