"""What runs in a trial's process: its job, in one process, telling Tune each held-out loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from ray import tune

from raylora.adapt.onto import names_of
from raylora.adapt.proof import ExportProver
from raylora.adapt.trained import Trained, trained
from raylora.assemble import Datasets, finish, make_run, pick_device, total_steps
from raylora.base.errors import RayloraError
from raylora.base.log import start_logging
from raylora.campaign import Campaign, Trial, measurements
from raylora.data.steps import StepPlan
from raylora.job import Job
from raylora.models import load_adapted, open_family
from raylora.on_ray.resources import stand_in
from raylora.optim.state import shown_values
from raylora.parts_of_job import adapter_optimizer
from raylora.training.checkpoint import checkpoint_steps, read_checkpoint
from raylora.training.loop import run_training
from raylora.training.reduce import Alone
from raylora.training.report import Row
from raylora.training.run_folder import read_precision
from raylora.training.state import restore_adapter, restore_optimizer


def run_trial(
    config: dict[str, Any], campaign: Campaign, datasets: Mapping[int, Datasets], folder: str
) -> None:
    """Train one trial from its newest checkpoint, or from the start.

    Args:
        config: Tune's: {"trial": number}.
        datasets: trial number -> what it trains on.
        folder: where the driver's relative paths begin.
    """
    start_logging()
    stand_in(folder)
    trial = campaign.trials[config["trial"]]
    if trial.job.fleet.cpus_only:
        torch.set_num_threads(trial.job.fleet.threads)
    try:
        _train(trial, datasets[trial.number])
    except RayloraError as error:
        # Told, not raised: Tune would try again what cannot go better.
        tune.report({"step": 0, "validation": float("inf"), "error": str(error)})


def trial_steps(job: Job, datasets: Datasets) -> int:
    """Global steps of a trial that is not stopped."""
    rows = datasets.training.rows
    return total_steps(job, StepPlan(rows, job.training.images_per_step, job.data.order_seed))


def prove_trial(trial: Trial, folder: str) -> dict[str, Any]:
    """Have diffusers read a trial's newest file, and compare it with the weights in training.

    Trials save without this proof, which takes seconds each time; the one that won needs it.

    Raises:
        ExportError: the file does not hold what was trained.
    """
    stand_in(folder)
    step = checkpoint_steps(trial.storage)[-1]
    file = trial.storage.read(f"checkpoints/{step:06d}/adapter.safetensors")
    with ExportProver() as prover:
        prover.start()  # its imports take seconds, which loading the base here takes too
        names = names_of(open_family(trial.job))
        report = prover.prove(file, _shown_at(trial, step), names)
    return {"trial": trial.job.name, "steps": step, **asdict(report)}


class _Teller:
    """Tells Tune each held-out loss once its checkpoint is stored, so Tune may stop the trial then.

    The last one is held back until the run is finished: a trial that got to the end stays whole.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._held: dict[str, Any] = {}

    def __call__(self, row: Row) -> None:
        """A sink of the run."""
        if "validation" in row:
            self._held = {"step": row["done"], "validation": row["validation"]}
            if row["done"] == 0:
                self.tell()
        elif row.get("event") == "saved" and row["step"] < self._total:
            self.tell()

    def tell(self) -> None:
        """Report what is held; does not return when the scheduler ends the trial."""
        held, self._held = self._held, {}
        if held:
            tune.report(held)


def _train(trial: Trial, datasets: Datasets) -> None:
    job, storage = trial.job, trial.storage
    for step, loss in measurements(storage):  # of earlier attempts, for the scheduler to compare
        tune.report({"step": step, "validation": loss, "again": True})
    if storage.entry("result.json") is not None:
        return
    teller = _Teller(trial_steps(job, datasets))
    run = make_run(
        job,
        open_family(job),
        datasets,
        storage,
        Alone(),
        pick_device(job),
        [teller],
        prove=False,
        share_host=True,
    )
    try:
        run_training(run)
    finally:
        run.close()
    finish(job, storage)
    teller.tell()


def _shown_at(trial: Trial, step: int) -> Trained:
    """What people get of the adapter at a step, from the checkpoint's exact values."""
    job = trial.job
    models = load_adapted(job, open_family(job), torch.device("cpu"))
    state = read_checkpoint(trial.storage, step)
    shown = "ema" if "ema" in state.tensors else "values"
    restore_adapter(models.adapter, state, values=shown)
    precision = read_precision(trial.storage)
    assert precision is not None, "it was kept before the first step"
    optimizer = adapter_optimizer(job, models, states=precision.states)
    restore_optimizer(optimizer, state)
    with shown_values(optimizer):
        return trained(models.adapter)
