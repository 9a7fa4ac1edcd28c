"""Ray Data: the cache's work items go through a pool of encoder actors, as many as the fleet has.

The road is that of one process: `prepare` names what is missing, `run_item` does one item and
leaves it in storage, so a killed cluster has lost at most the items in hand, and nobody waits for
one slow worker. Only names travel between the stages; pixels and tensors stay where they are made.
"""

from __future__ import annotations

import logging
import os
import pickle
from dataclasses import dataclass
from typing import Any

import ray

from raylora.assemble import Datasets, load_datasets, pick_device
from raylora.base.errors import MemoryPlanError
from raylora.base.log import get_logger, start_logging
from raylora.check import Checked
from raylora.data.plan import PlanFacts, WorkItem
from raylora.encoding import Encoding
from raylora.job import Job, job_from
from raylora.models import open_family
from raylora.on_ray.resources import stand_in

log = get_logger("cache")


class _Encode:
    """An actor that does work items, one encoder on its device at a time."""

    def __init__(self) -> None:
        start_logging()
        self._encoding: Encoding | None = None
        self._problem = ""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        work: _Work = pickle.loads(row["work"])
        if self._problem:
            return {"encoded": 0, "problem": self._problem}
        try:
            self._encoding = self._encoding or self._begin(work)
            report = self._encoding.run(work.facts, work.item)
        except MemoryPlanError as error:  # Ray would tell it within a traceback of its own
            self._problem = str(error)
            return {"encoded": 0, "problem": self._problem}
        return {"encoded": report.encoded, "problem": ""}

    def _begin(self, work: _Work) -> Encoding:
        stand_in(work.folder)
        job = job_from(work.job)
        return Encoding(job, open_family(job), pick_device(job))


@dataclass(frozen=True)
class _Work:
    """A work item and what an actor needs to start; small, so it rides along with each."""

    facts: PlanFacts
    item: WorkItem
    job: dict[str, Any]
    folder: str


def prepare_on_ray(checked: Checked) -> Datasets:
    """Encode what the job's cache lacks on the connected cluster, and load the rows.

    Raises:
        MemoryPlanError: an actor's device does not hold what has to be encoded.
    """
    job = checked.job.plain()
    work = [
        _Work(plan.facts, item, job, os.getcwd()) for plan in checked.plans for item in plan.items
    ]
    # An actor changes its model as seldom as it can.
    work.sort(key=lambda one: one.item.kind)
    if work:
        _run(checked.job, work)
    return load_datasets(checked.plans)


def _run(job: Job, work: list[_Work]) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    gpus = 0 if job.fleet.cpus_only else 1
    actors = min(job.fleet.count, len(work))
    done = (
        ray.data.from_items(
            [{"work": pickle.dumps(one)} for one in work], override_num_blocks=len(work)
        )
        .map(
            _Encode,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
            num_cpus=job.fleet.cpus_per_worker,
            num_gpus=gpus or None,
        )
        .take_all()
    )
    problems = [row["problem"] for row in done if row["problem"]]
    if problems:
        raise MemoryPlanError(problems[0])
    encoded = sum(row["encoded"] for row in done)
    log.info("%d entries encoded by up to %d actors", encoded, actors)
