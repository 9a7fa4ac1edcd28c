"""Job + Device -> Run; `parts_of_job.py` makes what its steps are computed with."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from raylora.adapt.from_file import adapter_on
from raylora.adapt.metadata import adapter_metadata
from raylora.adapt.onto import names_of
from raylora.adapt.proof import ExportProver
from raylora.base.log import get_logger
from raylora.base.storage import Storage, open_storage
from raylora.base.units import mib
from raylora.components.vae import Tiling
from raylora.data.dataset import CachePlan, Dataset, load_dataset, prepare
from raylora.data.options import SetOptions
from raylora.data.steps import StepPlan
from raylora.data.supply import Extras, Supply, measured_tensors
from raylora.data.variants import Chooser
from raylora.families import Family
from raylora.fit import (
    fit_worker,
    largest_bucket,
    make_memory,
    make_trial,
)
from raylora.header import adapter_facts, image_facts
from raylora.job import Job
from raylora.memory.lending import free_on, lending_of
from raylora.memory.setting import Precision
from raylora.parts_of_job import make_parts
from raylora.preview.options import usual_of
from raylora.training.course import Course, steps_between
from raylora.training.finish import finish_run
from raylora.training.loader import Loader
from raylora.training.loop import Run
from raylora.training.memory import DeviceMemory
from raylora.training.parts import Parts
from raylora.training.reduce import Group
from raylora.training.report import Reporter, Sink, worker_teller
from raylora.training.run_folder import (
    claim_attempt,
    claim_run,
    finished_steps,
    keep_precision,
    settle_move,
)
from raylora.training.sample import Previews
from raylora.training.save import Saver
from raylora.training.shares import Shares
from raylora.training.trackers import make_trackers
from raylora.training.validate import Measured, Validation

log = get_logger("train")


@dataclass(frozen=True)
class Datasets:
    """What is trained on, and what is held out."""

    training: Dataset
    validation: Dataset | None

    @property
    def all(self) -> list[Dataset]:
        """Both."""
        return [self.training, *([self.validation] if self.validation else [])]


def open_store(job: Job) -> Storage:
    """The run's folder in the store."""
    return open_storage(job.store).within(job.run_folder)


def claim(
    job: Job, *, extend: bool = False, moved: bool = False
) -> tuple[Storage, dict[str, Any] | None]:
    """Take the run's name; (its folder, result.json when nothing is left to do)."""
    storage = open_store(job)
    claim_run(storage, job.plain(), name=job.name, extend=extend, moved=moved)
    if finished_steps(storage) is None:
        return storage, None
    result: dict[str, Any] = json.loads(storage.read("result.json"))
    return storage, {**result, "already_done": True}


def pick_device(job: Job) -> torch.device:
    """The GPU of this machine, or the CPU where there is none or the job asks for it."""
    return torch.device("cuda" if torch.cuda.is_available() and not job.fleet.cpus_only else "cpu")


def set_groups(job: Job) -> list[tuple[SetOptions, ...]]:
    """What is trained on and, where there is one, the held-out folder."""
    held_out = job.held_out_set
    return [job.sets] if held_out is None else [job.sets, (held_out,)]


def plan_dataset(
    job: Job, sets: tuple[SetOptions, ...], family: Family, *, rehash: bool, workers: int = 1
) -> CachePlan:
    """What has to be encoded for some sets of the job."""
    latents_facts, text_facts = family.encoder_facts()
    data = job.data
    if sets is not job.sets:  # held out: the same every time, so cached whatever the others are
        data = data.model_copy(update={"cache": None, "cache_text": True})
    return prepare(
        data,
        sets,
        job.cache_url,
        latents_facts=latents_facts,
        text_facts=text_facts,
        rehash=rehash,
        workers=workers,
    )


def load_datasets(plans: Sequence[CachePlan]) -> Datasets:
    """The rows of finished plans; says what they hold."""
    sets = [load_dataset(plan) for plan in plans]
    for plan, dataset in zip(plans, sets, strict=True):
        log.info(
            "%s: %d images in %d buckets, %d bad",
            ", ".join(dict.fromkeys(plan.facts.folders)),
            len(dataset.rows),
            len(dataset.rows.showings_by_bucket()),
            len(dataset.bad),
        )
    return Datasets(sets[0], sets[1] if len(sets) > 1 else sets[0].held_out)


def total_steps(job: Job, plan: StepPlan) -> int:
    """Global steps of the whole run."""
    if job.training.steps is not None:
        return job.training.steps
    assert job.training.epochs is not None
    return math.ceil(job.training.epochs * plan.steps_per_epoch)


def make_run(
    job: Job,
    family: Family,
    datasets: Datasets,
    storage: Storage,
    group: Group,
    device: torch.device,
    sinks: Sequence[Sink] = (),
    *,
    prove: bool = True,
    report: bool = True,
    share_host: bool = False,
) -> Run:
    """Everything one worker needs; worker 0 also gets what reports and saves, unless not asked.

    Args:
        share_host: other runs with this base on the machine have streamed weights with it.
    """
    plan = StepPlan(datasets.training.rows, job.training.images_per_step, job.data.order_seed)
    total = total_steps(job, plan)
    pinned = None if job.fleet.shares == "measured" else job.fleet.shares
    shares = Shares(group.size, pinned if group.size > 1 else None)
    chooser = Chooser(job.sets, seed=job.seed, total_steps=total)
    tokens = family.tokens if job.network.trains_text else None
    live = job.data.pictures_live or (job.data.texts_live and tokens is None)
    # Before memory is probed, so nothing is loaded yet: a plan counts these models itself.
    keeping = lending_of(family, job.memory, device, keep=True)
    encoder = family.load_encoder(device=device, lender=keeping) if live else None
    extras = Extras(family.wants_geometry, family.encoder_dropout)
    supply = Supply(datasets.training, plan, chooser, encoder, tokens, extras)
    loader = Loader(supply, plan, shares, group.rank)
    fit = fit_worker(job, family, largest_bucket(datasets.all), storage, group, device)
    memory = make_memory(job, device)
    if fit.shares and not shares.pinned:
        shares.weights = fit.shares
    parts = make_parts(
        job, family, loader, group, shares, total, device, fit, memory, share_host=share_host
    )
    first = group.rank == 0 and report
    if first:
        keep_precision(storage, fit.precision)
    attempt = int(group.gather([float(claim_attempt(storage) if first else 0)])[0][0])
    reporter = _make_reporter(job, storage, attempt, total, memory, sinks) if first else None
    if report:
        told = reporter.event if reporter else None
        parts.fitting.tell_to(told or worker_teller(storage, attempt=attempt, rank=group.rank))
    prover = ExportProver() if prove and first else None
    if prover:
        prover.start()  # its imports take seconds; they are over when the first save comes
    make_saver = partial(
        _make_saver, job, family, datasets, plan, total, storage, prover, parts, fit.precision
    )
    held_out = datasets.validation
    measured = partial(measured_tensors, tokens=tokens, extras=extras)
    return Run(
        parts=parts,
        course=_course(job, total, plan.steps_per_epoch),
        storage=storage,
        content=content(family, datasets),
        validation=_make_validation(job, datasets.training, held_out, measured)
        if held_out
        else None,
        previews=_make_previews(job, family, storage, device, memory),
        reporter=reporter,
        saver=make_saver(attempt) if first else None,
        memory=memory,
        trial=make_trial(job, fit, parts, memory),
    )


def settle(job: Job, storage: Storage, family: Family, datasets: Datasets) -> None:
    """After `claim` with `moved`: the new places are the run's, if they hold what it has seen.

    Raises:
        JobError: they hold something else.
    """
    settle_move(storage, job.plain(), content(family, datasets))


def content(family: Family, datasets: Datasets) -> dict[str, str]:
    """Fingerprints of what is trained on, as checkpoints hold them."""
    held_out = datasets.validation
    return {
        "dataset": datasets.training.rows.fingerprint(),
        "held_out": held_out.rows.fingerprint() if held_out else "none",
        "base": family.fingerprint(),
    }


def finish(job: Job, storage: Storage) -> dict[str, Any]:
    """Leave the file, pictures and curves in the run's folder."""
    result = finish_run(storage, name=job.name, preview=job.preview)
    log.info("adapter %s in %s", mib(result["adapter_bytes"]), storage.url)
    return result


def _make_previews(
    job: Job, family: Family, storage: Storage, device: torch.device, memory: DeviceMemory
) -> Previews | None:
    preview = job.preview.with_usual(usual_of(family, job.family))
    if not preview.prompts:
        return None
    budget = memory.budget.tracker if memory.budget else None
    lender = lending_of(family, job.memory, device, budget=budget)
    tiling = Tiling(job.memory.vae_tiling, free_on(device, job.memory, budget))
    return Previews(family, preview, storage, lender, tiling)


def _make_validation(
    job: Job, training: Dataset, held_out: Dataset, measured: Measured
) -> Validation:
    options = job.validation
    return Validation(
        held_out,
        options.timesteps,
        training=training,
        training_images=options.training_images,
        measured=measured,
    )


def _course(job: Job, total: int, epoch: int) -> Course:
    training, validation, preview = job.training, job.validation, job.preview
    return Course(
        total_steps=total,
        save_every=steps_between(training.save_every_steps, training.save_every_epochs, epoch),
        validate_every=steps_between(validation.every_steps, validation.every_epochs, epoch),
        preview_every=steps_between(preview.every_steps, preview.every_epochs, epoch),
        preview_first=preview.at_start,
        refit_every=job.fleet.refit_every_steps,
        checksum_every=job.fleet.checksum_every_steps,
        keep_best=training.keep_best,
        patience=validation.patience,
        min_delta=validation.min_delta,
    )


def _make_reporter(
    job: Job,
    storage: Storage,
    attempt: int,
    total: int,
    memory: DeviceMemory,
    sinks: Sequence[Sink],
) -> Reporter:
    reporter = Reporter(
        storage,
        attempt=attempt,
        total_steps=total,
        every_steps=job.log.every_steps,
        memory=memory,
        sinks=sinks,
        trackers=make_trackers(job.log, storage, attempt=attempt, name=job.name, job=job.plain()),
    )
    reporter.event(
        "started", attempt=attempt, steps=total, host=socket.gethostname(), process=os.getpid()
    )
    return reporter


def _make_saver(
    job: Job,
    family: Family,
    datasets: Datasets,
    plan: StepPlan,
    total: int,
    storage: Storage,
    prover: ExportProver | None,
    parts: Parts,
    precision: Precision,
    attempt: int,
) -> Saver:
    started, licence = time.time(), family.base.license or ""
    images = image_facts(job, datasets.training)

    def metadata(step: int) -> dict[str, str]:
        facts = adapter_facts(
            job,
            family,
            datasets.training,
            plan,
            images,
            held_out=len(datasets.validation.rows) if datasets.validation else 0,
            step=step,
            total_steps=total,
            started_at=started,
            base_license=licence,
            base_precision=precision.base,
            now=time.time(),
        )
        return adapter_metadata(facts)

    names, exact = names_of(family), parts.adapter.values.dtype
    adapter_of = partial(adapter_on, parts.adapter.sites, names, dtype=exact, device=parts.device)
    return Saver(
        storage,
        dtype=getattr(torch, job.export.dtype),
        metadata=metadata,
        prover=prover,
        keep_last=job.training.keep_last,
        attempt=attempt,
        names=names,
        naming=job.export.naming,
        adapter_of=adapter_of if prover else None,
    )
