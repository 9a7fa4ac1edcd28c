"""Everything that can be found wrong with a job before a GPU hour is spent, all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from raylora.arithmetic import count_bytes, count_job, count_tokens, token_advice
from raylora.assemble import (
    pick_device,
    plan_dataset,
    set_groups,
    total_steps,
)
from raylora.base.errors import JobError, UserError
from raylora.base.options import Options
from raylora.base.storage import open_storage
from raylora.data.dataset import CachePlan
from raylora.data.steps import StepPlan
from raylora.diffusion.losses import loss_problems
from raylora.diffusion.noise import noise_problems, trained_process
from raylora.diffusion.timesteps import timestep_problems
from raylora.families import Family
from raylora.job import Job
from raylora.memory.bases import base_problem
from raylora.models import files_fit, open_family, with_seed
from raylora.optim.optimizers import optimizer_problem, optimizer_warning
from raylora.optim.schedules import make_schedule, schedule_warning
from raylora.optim.states import with_eight_bits
from raylora.preview.options import usual_of
from raylora.training.trackers import report_problems

T = TypeVar("T")


@dataclass(frozen=True)
class Checked:
    """A job that can run, and what was found out on the way.

    Attributes:
        family: the opened base.
        plans: what the cache lacks, for training and (where there is one) the held-out folder.
        warnings: what a person should know but may want so.
        tokens: the captions' lengths (`arithmetic.count_tokens`).
    """

    job: Job
    family: Family
    plans: list[CachePlan]
    warnings: list[str]
    tokens: dict[str, Any]


def check_job(job: Job, *, rehash: bool = False) -> Checked:
    """Open the base, list the images, prove the store; draw the seed where it is blank.

    Raises:
        JobError: every problem that was found, one sentence each.
    """
    problems: list[str] = []
    family = _collect(problems, lambda: open_family(job))
    store_problems: list[str] = []
    _collect(store_problems, lambda: open_storage(job.store).check())
    problems += store_problems
    if not store_problems:
        job = with_seed(job)
    plans: list[CachePlan] = []
    if family is not None:
        opened = family
        problems += base_problems(job, opened)
        _collect(problems, lambda: files_fit(job, opened))
        plan = partial(plan_dataset, job, family=family, rehash=rehash, workers=job.fleet.count)
        for sets in set_groups(job):
            planned = _collect(problems, partial(plan, sets))
            plans += [planned] if planned else []
        if plans and not problems:
            problems += _run_problems(job, plans)
    if problems or family is None:
        raise JobError(list(dict.fromkeys(problems)))
    tokens = count_tokens(job, plans[0], family)
    advice = token_advice(tokens, family)
    warnings = [*_warnings(job, plans), *([advice] if advice else [])]
    return Checked(job, family, plans, warnings, tokens)


def base_problems(job: Job, family: Family) -> list[str]:
    """Sizes, timesteps, noise and losses that this base cannot take, one sentence each."""
    process = trained_process(family.process, job.noise)
    step, kind = family.size_step, job.family.kind
    timesteps = job.timesteps.with_usual(family.usual_draw, family.usual_shift)
    found = [
        *noise_problems(job.noise, family.process, kind),
        *loss_problems(job.loss, process, kind),
        *timestep_problems(timesteps, process, kind),
    ]
    found += memory_problems_here(job, pick_device(job))
    sides = {}
    for number, options in enumerate(job.sets):
        place = f"data.sets.{number}" if job.data.sets else "data"
        if not options.enable_bucket:
            sides[f"{place}.resolution"] = options.resolution
        elif options.bucket_reso_steps % step:
            found.append(
                f"{place}.bucket_reso_steps is {options.bucket_reso_steps}; this base needs a "
                f"multiple of {step}."
            )
    for name, size in sides.items():
        if any(side % step for side in size):
            found.append(f"{name} {size[0]}x{size[1]}: this base needs multiples of {step}.")
    last = family.process.steps
    high = job.training.max_timestep or last
    if high > last or job.training.min_timestep >= high:
        found.append(
            f"training.min_timestep {job.training.min_timestep} and max_timestep {high}: the base "
            f"has timesteps 0 to {last - 1}."
        )
    usual = usual_of(family, job.family)
    found += job.preview.problems(usual, size_step=step, process=process)
    found += report_problems(job.log)
    wrong = [t for t in job.validation.timesteps if not 0 <= t < last]
    if wrong:
        found.append(f"validation.timesteps {wrong}: the base has timesteps 0 to {last - 1}.")
    return found


def memory_problems_here(job: Job, device: torch.device) -> list[str]:
    """What this machine lacks for how the job holds base and optimizer, one sentence each."""
    memory, optimizer = job.memory, job.optimizer
    if memory.states == "8bit":
        optimizer = with_eight_bits(optimizer)
    lacks = [
        base_problem("full" if memory.base == "auto" else memory.base),
        optimizer_problem(optimizer, device.type),
    ]
    return [problem for problem in lacks if problem]


def memory_warnings(job: Job, device: torch.device) -> list[str]:
    """Words of memory that do nothing where the job would run here."""
    memory = job.memory
    if device.type != "cpu":
        return []
    graphs = (
        ["memory.cuda_graphs: a CPU's kernels are not recorded, so that it does nothing here."]
        if memory.cuda_graphs is True
        else []
    )
    if memory.budget_gib is not None:
        return graphs
    words = {
        "streaming": memory.streaming not in ("auto", 0),
        "offload_inputs": memory.offload_inputs is True,
        "host_states": memory.host_states is True,
    }
    given = [f"memory.{word}" for word, there in words.items() if there]
    if not given:
        return graphs
    return [
        *graphs,
        f"{' and '.join(given)}: on a CPU the device's memory is the host's, so that nothing is "
        "saved. Leave it to GPUs, or give the CPU a memory.budget_gib.",
    ]


def arithmetic(checked: Checked) -> dict[str, Any]:
    """The steps arithmetic: images, repeats, buckets, steps an epoch, epochs, tokens, bytes."""
    job, plan = checked.job, checked.plans[0]
    of_steps = StepPlan(plan.rows, job.training.images_per_step, job.data.order_seed)
    held_out = checked.plans[1].rows if len(checked.plans) > 1 else plan.held_out
    return {
        **count_job(job, plan, of_steps, total_steps(job, of_steps)),
        "held_out_images": len(held_out),
        "tokens": checked.tokens,
        "cache": count_bytes(job, plan, checked.family),
        "to_encode": {
            "images": sum(plan.missing("latents") for plan in checked.plans),
            "captions": sum(plan.missing("text") for plan in checked.plans),
        },
    }


def _run_problems(job: Job, plans: list[CachePlan]) -> list[str]:
    """What can only be seen once images and steps are counted."""
    found: list[str] = []
    total = _steps_of(job, plans[0])
    _collect(found, lambda: make_schedule(job.schedule, total, abs(job.optimizer.rate)))
    split = max(options.validation_split for options in job.sets)
    if split and not len(plans[0].held_out):
        found.append(
            f"data.validation_split is {split:g}, which holds out none of "
            f"{len(plans[0].rows)} images. Raise it, or leave it out."
        )
    return found


def _steps_of(job: Job, plan: CachePlan) -> int:
    return total_steps(job, StepPlan(plan.rows, job.training.images_per_step, job.data.order_seed))


def _warnings(job: Job, plans: list[CachePlan]) -> list[str]:
    found = [note for plan in plans for note in plan.notes]
    found += memory_warnings(job, pick_device(job))
    seldom_meant = optimizer_warning(job.optimizer)
    found += [seldom_meant] if seldom_meant else []
    showings = int(plans[0].rows.repeats.sum())
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
    if job.training.precision == "fp16" and pick_device(job).type == "cpu":
        found.append(
            "training.precision fp16 is for GPUs older than Ampere; a CPU computes it slowly. "
            "Choose fp32."
        )
    too_long = schedule_warning(job.schedule, _steps_of(job, plans[0]))
    found += [too_long] if too_long else []
    found += _idle(job, plans)
    held_out = (job.validation.folder or "").rstrip("/")
    if held_out and any((one.folder or "").rstrip("/") == held_out for one in job.sets):
        found.append(
            f"validation.folder is {held_out}, which is trained on too: its loss tells nothing of "
            "other images. Give a folder of others, or data.validation_split in its place."
        )
    return found


def _idle(job: Job, plans: list[CachePlan]) -> list[str]:
    """Sections that say how, where nothing says what; but not where that is null or [] in words."""
    held_out = len(plans) > 1 or len(plans[0].held_out)
    missing: dict[str, tuple[Options, str, str]] = {}
    if not held_out:
        missing["validation"] = job.validation, "folder", "nothing is held out"
    if not job.preview.prompts:
        missing["preview"] = job.preview, "prompts", "nothing is drawn"
    found = []
    for section, (options, word, reason) in missing.items():
        usual = type(options)().model_dump()
        given = [name for name, value in options.model_dump().items() if value != usual[name]]
        if given and word not in options.model_fields_set:
            found.append(
                f"{section} has {', '.join(given)}, and {reason}. Give {section}.{word}, or leave "
                "the section out."
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
