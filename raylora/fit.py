"""Fitting a job onto this worker's device: probe, gather, plan; or the job's words alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from raylora.base.log import get_logger
from raylora.base.storage import Storage, open_storage
from raylora.base.units import GIB, gib
from raylora.data.dataset import Dataset
from raylora.data.pixels.bucket import Size
from raylora.families import Family
from raylora.job import Job
from raylora.measure import asked_of_job, need_of_job
from raylora.memory.budget import Budget, limit_gpu
from raylora.memory.card import Card
from raylora.memory.emulate import Kernels
from raylora.memory.host import HostMemory
from raylora.memory.need import Need
from raylora.memory.plan import CardPlan, make_plan, shares
from raylora.memory.probe import probe
from raylora.memory.setting import Precision, Setting
from raylora.models import words_alone
from raylora.training.fitting import Fitting, described
from raylora.training.known import KnownSettings
from raylora.training.memory import DeviceMemory
from raylora.training.parts import Parts
from raylora.training.reduce import Group, gather_plain
from raylora.training.run_folder import read_precision
from raylora.training.trial import Trial

log = get_logger("memory")


@dataclass(frozen=True)
class Fit:
    """How one worker fits.

    Attributes:
        precision: of the whole run.
        setting: to begin with.
        plan: for this card; None where nothing was planned.
        known: where settings that proved themselves are kept; None likewise.
        shares: each worker's part of a step by predicted speed, to begin with; None likewise.
    """

    precision: Precision
    setting: Setting
    plan: CardPlan | None = None
    known: KnownSettings | None = None
    shares: list[float] | None = None


def is_planned(job: Job, device: torch.device) -> bool:
    """Whether a device's memory has a limit that a plan must keep to."""
    return device.type == "cuda" or job.memory.budget_gib is not None


def fit_worker(
    job: Job, family: Family, bucket: Size, storage: Storage, group: Group, device: torch.device
) -> Fit:
    """What this worker does to fit; every worker of the run calls it.

    Args:
        bucket: the largest of the run.
        storage: the run's folder, which knows the precision of one that goes on.

    Raises:
        PlanError: no precision that the job or the run allows fits every worker.
    """
    kept = read_precision(storage)
    if not is_planned(job, device):
        precision, setting = words_alone(job)
        group.barrier()  # nobody writes the run's precision before all have looked for it
        return Fit(kept or precision, setting)
    card = probe(device, options=job.memory)
    cards = [Card.from_plain(held) for held in gather_plain(group, card.plain())]
    kernels: Kernels = "cpu" if device.type == "cpu" else "cuda"
    need = need_of_job(job, family, bucket, kernels=kernels)
    asked = replace(asked_of_job(job), encodes=False)  # what is cached was cached before
    plan = make_plan(need, asked, cards, kept=kept)
    mine = plan.workers[group.rank]
    known = KnownSettings(
        open_storage(job.store).within("plans"), _shape(job, need, plan.precision, card)
    )
    setting = _known_or_planned(known, mine)
    log.info("plan %s %s: %s", card.name, gib(card.total_bytes), described(setting))
    return Fit(plan.precision, setting, mine, known, shares(plan))


def _shape(job: Job, need: Need, precision: Precision, card: Card) -> dict[str, Any]:
    """What a setting that proved itself depends on."""
    return {
        "card": card.name,
        "total_bytes": card.total_bytes,
        "family": job.family.kind,
        "denoiser_numbers": need.denoiser.numbers,
        "bucket": list(need.bucket),
        "adapter_numbers": need.adapter_numbers,
        "images_per_step": job.training.images_per_step,
        "precision": precision.plain(),
        "optimizer": job.optimizer.name,
        "sums": job.training.sums,
        "ema": job.ema.decay is not None,
        "memory": job.memory.model_dump(mode="json"),
    }


def _known_or_planned(known: KnownSettings, plan: CardPlan) -> Setting:
    """What a run of this shape came to, where that still fits; a trial looks at it again."""
    found = known.read()
    if found is None or found[1].peak_bytes > plan.budget_bytes:
        return plan.chosen.setting
    foreseen = plan.known(found[0])
    if foreseen is not None:  # of the other phases, and of the host, nothing was observed
        others = [peak for phase, peak in foreseen.peaks.items() if phase != "train"]
        if max(others) > plan.budget_bytes or foreseen.host_bytes > plan.host_budget_bytes:
            return plan.chosen.setting
    return found[0]


def largest_bucket(datasets: Sequence[Dataset]) -> Size:
    """The bucket of the most pixels, trained on or held out."""
    counts = [bucket for one in datasets for bucket in one.rows.showings_by_bucket()]
    return max(counts, key=lambda size: (size[0] * size[1], size))


def make_memory(job: Job, device: torch.device) -> DeviceMemory:
    """The device's memory, limited as the job says."""
    budget_gib = job.memory.budget_gib
    if budget_gib is None:
        return DeviceMemory(device)
    limit_bytes = int(budget_gib * GIB)
    if device.type == "cuda":
        limit_gpu(device, budget_gib)
        return DeviceMemory(device, limit_bytes=limit_bytes)
    return DeviceMemory(device, budget=Budget(limit_bytes))


def make_fitting(job: Job, fit: Fit, device: torch.device, memory: DeviceMemory) -> Fitting:
    """The way down from the setting; where nothing limits the device, only micro-batches are."""
    options = job.memory
    if fit.plan is None:
        fixed = {
            "checkpointing": fit.setting.checkpointing,
            "streaming": fit.setting.streamed,
            "offload_inputs": fit.setting.offload,
            "host_states": fit.setting.host_states,
        }
        options = options.model_copy(update=fixed)
    return Fitting(
        fit.setting,
        options=options,
        plan=fit.plan,
        memory=memory,
        limited=is_planned(job, device),
        retries=device.type == "cuda",
    )


def make_trial(job: Job, fit: Fit, parts: Parts, memory: DeviceMemory) -> Trial | None:
    """What compares the plan with two real steps, where there is one."""
    if fit.plan is None or fit.known is None:
        return None
    asked = asked_of_job(job)
    each = asked.state_bytes
    if fit.precision.states == "8bit":
        each = asked.state_bytes_8bit or each
    states_bytes = round(each * parts.adapter.values.numel())
    return Trial(fit.plan, memory, states_bytes=states_bytes, known=fit.known)


def host_memory(family: Family, fit: Fit, *, shared: bool) -> HostMemory | None:
    """Where streamed weights lie.

    Args:
        shared: one copy serves all workers with this base on a machine.
    """
    if fit.plan is None and not fit.setting.streamed:
        return None
    if not shared:
        return HostMemory()
    what = f"{family.fingerprint()} {fit.precision.arithmetic} {fit.precision.base}"
    return HostMemory(hashlib.sha256(what.encode()).hexdigest()[:16])
