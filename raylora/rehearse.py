"""Two real steps of a job on this machine, without its images: predicted beside observed."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from raylora.assemble import open_store, pick_device
from raylora.base.errors import UserError
from raylora.data.pixels.bucket import Size
from raylora.fit import fit_worker, is_planned, make_memory, make_trial
from raylora.job import Job
from raylora.measure.on_meta import blank_batch
from raylora.models import open_family
from raylora.parts_of_job import make_parts
from raylora.training.loader import Loader
from raylora.training.reduce import Alone
from raylora.training.shares import Shares
from raylora.training.trial import Batch


def rehearse(job: Job, bucket: Size) -> dict[str, Any]:
    """Load the base, do as the plan says, and take two steps' gradients; nothing is kept.

    Args:
        bucket: (width, height) in pixels.

    Returns:
        `setting`, `predicted_peak_bytes`, `observed_peak_bytes`, `predicted_seconds_per_image` and
        `observed_seconds_per_image`, of training.

    Raises:
        UserError: there is nothing to measure on, or the base is not there.
        MemoryPlanError: the job fits in no setting.
    """
    device = pick_device(job)
    if not is_planned(job, device):
        raise UserError(
            "There is no GPU here to measure on. Set memory.budget_gib to measure on this "
            "machine's CPU, or leave --measure out."
        )
    family = open_family(job)
    job = (
        job
        if job.training.seed is not None
        else job.model_copy(update={"training": job.training.model_copy(update={"seed": 0})})
    )
    fit = fit_worker(job, family, bucket, open_store(job), Alone(), device)
    memory = make_memory(job, device)
    parts = make_parts(
        *(job, family, cast("Loader", None), Alone(), Shares(1), 1, device, fit, memory),
        share_host=False,
    )
    trial = make_trial(job, fit, parts, memory)
    assert trial is not None, "the device is planned for"
    assert fit.plan is not None

    def batch() -> Batch:
        images = parts.micro_batch
        held: dict[str, Tensor] = blank_batch(job, family, bucket, images)
        return list(range(images)), held

    with memory.limited():
        observed = parts.fitting.again(lambda: trial.observe(parts, batch()), "the measured steps")
    setting = parts.fitting.setting
    predicted = fit.plan.known(setting)
    return {
        "card": fit.plan.card.name,
        "setting": setting.plain(),
        "predicted_peak_bytes": predicted.peaks["train"] if predicted else None,
        "observed_peak_bytes": observed.peak_bytes,
        "predicted_seconds_per_image": predicted.seconds_per_image if predicted else None,
        "observed_seconds_per_image": observed.seconds_per_image,
    }
