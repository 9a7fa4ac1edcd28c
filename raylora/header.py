"""What a run's LoRA file says about itself: the facts of job, base and dataset for its header."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

from raylora.adapt.metadata import AdapterFacts
from raylora.base.seeds import sample_number
from raylora.base.version import VERSION
from raylora.data.dataset import Dataset
from raylora.data.steps import StepPlan
from raylora.families import Family
from raylora.job import Job


def adapter_facts(
    job: Job,
    family: Family,
    dataset: Dataset,
    plan: StepPlan,
    *,
    step: int,
    total_steps: int,
    started_at: float,
    now: float,
) -> AdapterFacts:
    """Facts of the file saved after `step` global steps."""
    network, training, data = job.network, job.training, job.data
    about = family.metadata
    return AdapterFacts(
        raylora_version=VERSION,
        job_json=json.dumps(job.plain(), sort_keys=True),
        output_name=job.name,
        architecture=f"{about['modelspec.architecture']}/lora",
        base_model_version=about["ss_base_model_version"],
        prediction_type="v" if about["modelspec.prediction_type"] == "v" else "epsilon",
        resolution=data.size,
        rank=network.rank,
        alpha=network.scale * network.rank,
        network_args={"layers": network.layers},
        images_per_step=training.images_per_step,
        steps=step,
        epoch=-(-step // plan.steps_per_epoch),
        max_steps=total_steps,
        epochs=-(-total_steps // plan.steps_per_epoch),
        seed=training.seed,
        learning_rate=job.optimizer.learning_rate,
        unet_rate=job.optimizer.learning_rate,
        optimizer=f"torch.optim.AdamW(weight_decay={job.optimizer.weight_decay},"
        f"betas={job.optimizer.betas},eps={job.optimizer.eps})",
        schedule=job.schedule.name,
        warmup_steps=job.schedule.warmup_steps,
        max_grad_norm=job.optimizer.max_grad_norm,
        mixed_precision="bf16" if training.precision == "bf16" else "no",
        started_at=started_at,
        finished_at=now,
        session_id=sample_number(job.name + job.fingerprint(), 0) % 2**32,
        train_images=sum(row.repeats for row in dataset.rows),
        batches_per_epoch=plan.steps_per_epoch,
        title=job.export.title or job.name,
        author=job.export.author or "",
        comment=job.export.comment,
        base_name=about["ss_sd_model_name"],
        loss=job.loss.name,
        min_snr_gamma=job.loss.weight.gamma if job.loss.weight.name == "min_snr" else None,
        enable_bucket=data.enable_bucket,
        bucket_no_upscale=data.bucket_no_upscale,
        min_bucket_reso=data.min_bucket_reso,
        max_bucket_reso=data.max_bucket_reso,
        validate_every_steps=job.validation.every_steps if job.validation.folder else None,
        **_images(job, dataset),
    )


def _images(job: Job, dataset: Dataset) -> dict[str, Any]:
    """Folders, tags and buckets, as sd-scripts' readers show them."""
    root = PurePosixPath(job.data.folder).name
    folders: dict[str, dict[str, int]] = {}
    tags: dict[str, Counter[str]] = {}
    for row in dataset.rows:
        parent = PurePosixPath(row.key).parent.name or root
        held = folders.setdefault(parent, {"n_repeats": row.repeats, "img_count": 0})
        held["img_count"] += 1
        words = [tag.strip() for tag in row.caption.split(",")]
        tags.setdefault(parent, Counter()).update(word for word in words if word)
    counts = Counter(row.bucket for row in dataset.rows for _ in range(row.repeats))
    buckets = {
        str(i): {"resolution": list(bucket), "count": counts[bucket]}
        for i, bucket in enumerate(sorted(counts))
    }
    return {
        "dataset_folders": folders,
        "tag_frequency": {folder: dict(counted) for folder, counted in tags.items()},
        "bucket_info": {"buckets": buckets, "mean_img_ar_error": _ratio_error(dataset)},
    }


def _ratio_error(dataset: Dataset) -> float:
    """Mean distance between images' and buckets' aspect ratios."""
    errors = [
        abs(row.original_size[0] / row.original_size[1] - row.bucket[0] / row.bucket[1])
        for row in dataset.rows
    ]
    return sum(errors) / max(1, len(errors))
