"""Finding or starting a cluster, and what a worker of the fleet asks of it."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from raylora.base.errors import UserError
from raylora.base.log import get_logger
from raylora.fleet import FleetOptions

log = get_logger("ray")
QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Ray's own default waits a minute before it notices that a node of the group is gone.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray Data's actors may share this machine's cores; it would warn at every start.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def connect(fleet: FleetOptions, *, needs_gpu: bool = True) -> None:
    """Join the cluster that RAY_ADDRESS names (a job's own), or start one on this machine.

    Args:
        needs_gpu: a fleet that is not of CPUs does not start without a GPU.

    Raises:
        UserError: Ray is not installed, the cluster does not answer or refuses the token, or this
            machine has no GPU for a fleet that needs one.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise UserError(
            "Ray is not installed. Run `pip install 'raylora[ray]'`, or train without it: add "
            "--local."
        ) from None
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    needs_gpu = needs_gpu and not fleet.cpus_only
    if needs_gpu and not address and not torch.cuda.is_available():
        raise UserError(
            "This machine has no GPU that PyTorch can use, and each worker wants one. Set "
            "fleet.cpus_only: true to train on its CPUs, add --local, or name a cluster that has "
            "GPUs in RAY_ADDRESS."
        )
    settings: dict[str, Any] = {
        "runtime_env": {"env_vars": worker_environment(fleet)},
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }
    try:
        if address:
            ray.init(address=address, **settings)
        else:
            # Ray Data logs an "error" at its every start that is none and only alarms people.
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            cpus = max(os.cpu_count() or 1, -(-fleet.count * fleet.cpus_per_worker // 1))
            ray.init(address="local", num_cpus=int(cpus), include_dashboard=False, **settings)
    except (ConnectionError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The Ray cluster at {address or 'this machine'} cannot be used: {first} Check "
            "RAY_ADDRESS, and RAY_AUTH_MODE=token with RAY_AUTH_TOKEN where it asks for a token."
        ) from None
    if needs_gpu and address and not ray.cluster_resources().get("GPU"):
        log.warning(
            "the cluster at %s has no GPU now, and each worker wants one: it waits until one "
            "joins. fleet.cpus_only: true trains on CPUs",
            address,
        )


def worker_environment(fleet: FleetOptions) -> dict[str, str]:
    """What must be set before a worker imports torch.

    Two processes with as many OpenMP threads each as there are cores spin against each other and
    run many times slower, so each gets its share of cores and its threads sleep while they wait.
    """
    held = {"OMP_WAIT_POLICY": "PASSIVE", **QUIET}
    return {**held, "OMP_NUM_THREADS": str(fleet.threads)} if fleet.cpus_only else held


def selectors(fleet: FleetOptions) -> list[dict[str, str]] | None:
    """One node selector a worker, where the job names GPU kinds."""
    if isinstance(fleet.workers, int):
        return None
    chosen = [
        {"ray.io/accelerator-type": kind.gpu} if kind.gpu else {}
        for kind in fleet.workers
        for _ in range(kind.count)
    ]
    return chosen if any(chosen) else None


def stand_in(folder: str) -> None:
    """Make a worker's relative paths mean what they meant to the driver.

    On a machine without that folder nothing changes, and a relative path is an error there: name
    data and weights by s3:// or absolute paths on a real cluster.
    """
    if os.path.isdir(folder):
        os.chdir(folder)
