"""Curves on Weights & Biases, one run there for one here, however often it is started."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from raylora.base.errors import OptionError
from raylora.base.storage import Storage
from raylora.training.options import WandbOptions

ID_KEY = "wandb.json"


class WandbRun:
    """A tracker that logs to Weights & Biases.

    Numbers carry their own step as the axis: theirs must never go back, and a resumed run does.

    Args:
        storage: the run's folder, which keeps the id.
        name: of the run, shown there.
        job: the whole job as plain data, shown there as its config.

    Raises:
        OptionError: the package is missing, or the service refuses.
    """

    def __init__(
        self, options: WandbOptions, storage: Storage, *, name: str, job: Mapping[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise OptionError('log.wandb needs wandb: `pip install "raylora[wandb]"`.') from None
        try:
            self._run = wandb.init(
                project=options.project,
                entity=options.entity,
                group=options.group,
                tags=list(options.tags),
                mode=options.mode,
                id=wandb_id(storage),
                resume="allow",
                name=name,
                config=dict(job),
                reinit="create_new",
                # Nothing of the machine but what was asked for: no console, git or code.
                settings=wandb.Settings(
                    console="off", disable_git=True, disable_code=True, silent=True
                ),
            )
        except wandb.errors.Error as error:
            raise OptionError(
                f"log.wandb: Weights & Biases refused: {error}. Check WANDB_API_KEY, "
                "log.wandb.entity and project, or choose mode: offline."
            ) from error
        self._run.define_metric("*", step_metric="step")

    def begin(self, done: int) -> None:
        """Steps that are done again are drawn over what was there."""

    def add(self, done: int, numbers: Mapping[str, float]) -> None:
        """One row of their history."""
        self._run.log({"step": done, **numbers})

    def flush(self) -> None:
        """Their own process sends rows as they come."""

    def close(self, *, finished: bool) -> None:
        """Say how it ended, and wait until all is sent."""
        self._run.finish(exit_code=0 if finished else 1)


def wandb_id(storage: Storage) -> str:
    """The run's id there: drawn once, and kept in the run's folder, so that a resume finds it."""
    mine = json.dumps({"id": uuid.uuid4().hex[:16]}).encode()
    held = mine if storage.create(ID_KEY, mine) else storage.read(ID_KEY)
    return str(json.loads(held)["id"])
