"""Everything that can be found wrong with a job before a GPU hour is spent, all at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from raylora.assemble import (
    data_sections,
    open_family,
    pick_device,
    plan_dataset,
    size_problems,
    total_steps,
)
from raylora.base.errors import JobError, UserError
from raylora.base.storage import open_storage
from raylora.data.dataset import CachePlan
from raylora.data.steps import StepPlan
from raylora.families import Family
from raylora.job import Job

T = TypeVar("T")


@dataclass(frozen=True)
class Checked:
    """A job that can run, and what was found out on the way.

    Attributes:
        family: the opened base.
        plans: what the cache lacks, for training and (where there is one) the held-out folder.
        warnings: what a person should know but may want so.
    """

    job: Job
    family: Family
    plans: list[CachePlan]
    warnings: list[str]


def check_job(job: Job, *, rehash: bool = False) -> Checked:
    """Open the base, list the images, prove the store.

    Raises:
        JobError: every problem that was found, one sentence each.
    """
    problems: list[str] = []
    family = _collect(problems, lambda: open_family(job))
    _collect(problems, lambda: open_storage(job.store).check())
    plans: list[CachePlan] = []
    if family is not None:
        problems += size_problems(job, family)
        plan = partial(plan_dataset, job, family=family, rehash=rehash, workers=job.fleet.count)
        for section in data_sections(job):
            planned = _collect(problems, partial(plan, section))
            plans += [planned] if planned else []
    if problems or family is None:
        raise JobError(list(dict.fromkeys(problems)))
    return Checked(job, family, plans, _warnings(job, plans))


def arithmetic(checked: Checked) -> dict[str, Any]:
    """The steps arithmetic: images, repeats, buckets, steps an epoch, epochs."""
    job, rows = checked.job, checked.plans[0].rows
    plan = StepPlan(rows, job.training.images_per_step, job.data.order_seed)
    total = total_steps(job, plan)
    buckets = Counter(row.bucket for row in rows for _ in range(row.repeats))
    return {
        "images": len(rows),
        "bad_images": len(checked.plans[0].bad),
        "images_with_repeats": plan.samples_per_epoch,
        "buckets": {f"{w}x{h}": count for (w, h), count in sorted(buckets.items())},
        "images_per_step": job.training.images_per_step,
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": total,
        "epochs": round(total / plan.steps_per_epoch, 2),
        "held_out_images": len(checked.plans[1].rows) if len(checked.plans) > 1 else 0,
        "to_encode": {
            "images": sum(plan.missing("latents") for plan in checked.plans),
            "captions": sum(plan.missing("text") for plan in checked.plans),
        },
    }


def _warnings(job: Job, plans: list[CachePlan]) -> list[str]:
    found = [note for plan in plans for note in plan.notes]
    showings = sum(row.repeats for row in plans[0].rows)
    if job.training.images_per_step > showings:
        found.append(
            f"training.images_per_step is {job.training.images_per_step}, but an epoch has only "
            f"{showings} images: each step holds {showings}."
        )
    if job.training.precision == "bf16" and pick_device(job).type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        if "AMX" not in capability:
            found.append(
                f"training.precision bf16 on this CPU ({capability}) is 2 to 10 times slower than "
                "fp32."
            )
    return found


def _collect(problems: list[str], action: Callable[[], T]) -> T | None:
    try:
        return action()
    except JobError as error:
        problems += error.problems
    except UserError as error:
        problems.append(str(error))
    return None
