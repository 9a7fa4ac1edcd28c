"""Curves in other people's viewers: TensorBoard files in the run's folder, Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from raylora.base.storage import Storage
from raylora.base.units import GIB
from raylora.training.options import LogOptions

Row = Mapping[str, Any]
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""What each extra brings."""


class Tracker(Protocol):
    """Takes numbers by global step; only worker 0 has any."""

    def begin(self, done: int) -> None:
        """The run goes on after so many steps; what an earlier attempt said of later ones is
        void."""

    def add(self, done: int, numbers: Mapping[str, float]) -> None:
        """Numbers after so many steps."""

    def flush(self) -> None:
        """Store everything so far."""

    def close(self, *, finished: bool) -> None:
        """The last word of this process; `finished` when the run is."""


def report_problems(options: LogOptions) -> list[str]:
    """What the job's trackers lack on this machine, one sentence each."""
    asked = {"tensorboard": options.tensorboard, "wandb": options.wandb is not None}
    found = [
        f"log.{extra} needs the package {PACKAGES[extra]}, which is not installed: "
        f'`pip install "raylora[{extra}]"`, or leave it out.'
        for extra, on in asked.items()
        if on and find_spec(PACKAGES[extra]) is None
    ]
    online = options.wandb is not None and options.wandb.mode == "online"
    if online and not os.environ.get("WANDB_API_KEY"):
        found.append(
            "log.wandb.mode is online, and the environment has no WANDB_API_KEY. Set it (on the "
            "machine of worker 0), or choose mode: offline and `wandb sync` later."
        )
    return found


def make_trackers(
    options: LogOptions, storage: Storage, *, attempt: int, name: str, job: Mapping[str, Any]
) -> list[Tracker]:
    """The trackers that a job asks for.

    Args:
        storage: the run's folder.
        attempt: of this process.
        job: the whole job as plain data.

    Raises:
        OptionError: a package is missing, or Weights & Biases refuses.
    """
    made: list[Tracker] = []
    if options.tensorboard:
        from raylora.training.to_tensorboard import TensorBoardFiles

        made.append(TensorBoardFiles(storage, attempt=attempt))
    if options.wandb is not None:
        from raylora.training.to_wandb import WandbRun

        made.append(WandbRun(options.wandb, storage, name=name, job=job))
    return made


def step_scalars(row: Row, average: float) -> dict[str, float]:
    """What is drawn of a step's row; `average` is the mean loss of the last epoch's steps."""
    rates = {f"lr/{group}": rate for group, rate in row["rates"].items()}
    return {
        "loss/current": row["loss"],
        "loss/average": average,
        **rates,
        "gradient_norm": row["gradient_norm"],
        **row.get("extra", {}),
    }


def progress_scalars(row: Row) -> dict[str, float]:
    """What is drawn of a progress row."""
    return {
        "epoch": row["epoch"],
        "images_per_second": row["images_per_second"],
        "memory/held_gib": row["memory_bytes"] / GIB,
        "memory/peak_gib": row["peak_bytes"] / GIB,
    }
