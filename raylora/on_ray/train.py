"""Ray Train: the same run, one worker a GPU (or a few CPUs), gradients summed over them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer

from raylora.assemble import Datasets, finish, make_run, open_store
from raylora.base.errors import RayloraError, TrainingError, UserError
from raylora.base.log import start_logging
from raylora.check import Checked
from raylora.job import Job, job_from
from raylora.local import begin, refuse_stopped
from raylora.models import open_family
from raylora.on_ray.cache import prepare_on_ray
from raylora.on_ray.progress import Progress
from raylora.on_ray.resources import selectors, stand_in
from raylora.training.loop import Outcome, run_training
from raylora.training.reduce import Alone, Distributed, Group
from raylora.training.report import Sink


def train_on_ray(
    checked: Checked, *, extend: bool = False, moved: bool = False, sinks: Sequence[Sink] = ()
) -> dict[str, Any]:
    """Cache, train and finish a checked job on the connected cluster.

    Returns:
        The content of result.json.

    Raises:
        UserError: the job cannot run.
        TrainingError: the fleet failed more often than fleet.max_failures allows.
    """
    job = checked.job
    begun = begin(checked, prepare_on_ray, extend=extend, moved=moved)
    if isinstance(begun, dict):
        return begun
    storage, datasets = begun
    held = ray.put(datasets)
    with Progress(sinks) as progress:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "job": job.plain(),
                "datasets": [held],
                "told": progress.sender,
                "folder": os.getcwd(),
            },
            scaling_config=_scaling(job),
            run_config=RunConfig(
                name=job.name,
                storage_path=_ray_storage(job),
                failure_config=FailureConfig(
                    max_failures=job.fleet.max_failures, controller_failure_limit=3
                ),
            ),
            torch_config=TorchConfig(backend="gloo"),
        )
        try:
            outcome: Outcome = trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error
    refuse_stopped(outcome)
    return finish(job, storage)


def _worker(config: dict[str, Any]) -> Outcome:
    """What every worker runs; Ray Train has set up the process group."""
    start_logging()
    stand_in(config["folder"])
    job = job_from(config["job"])
    datasets: Datasets = ray.get(config["datasets"][0])
    group: Group = Distributed() if get_context().get_world_size() > 1 else Alone()
    device = ray.train.torch.get_device()
    if job.fleet.cpus_only:
        torch.set_num_threads(job.fleet.threads)
    told = config["told"]
    sinks: list[Sink] = [told.put.remote] if group.rank == 0 else []
    run = make_run(job, open_family(job), datasets, open_store(job), group, device, sinks)
    try:
        return run_training(run)
    finally:
        run.close()


def _scaling(job: Job) -> ScalingConfig:
    fleet = job.fleet
    resources = {"CPU": fleet.cpus_per_worker}
    if not fleet.cpus_only:
        resources["GPU"] = 1
    return ScalingConfig(
        num_workers=fleet.count,
        use_gpu=not fleet.cpus_only,
        resources_per_worker=resources,
        label_selector=selectors(fleet),
    )


def _ray_storage(job: Job) -> str:
    """Ray's own bookkeeping, beside the runs; credentials stay in the environment."""
    url = open_store(job).url.removesuffix(f"/{job.run_folder}")
    return f"{url}/ray".removeprefix("file://")


def _cause(error: Exception) -> RayloraError:
    """The worker's own mistake, where it has one, in its own words."""
    for failure in getattr(error, "worker_failures", {}).values():
        inner = getattr(failure, "cause", None) or failure
        if isinstance(inner, UserError):
            return inner
        return TrainingError(f"a worker failed: {inner}")
    return TrainingError(f"the fleet failed: {error}")
