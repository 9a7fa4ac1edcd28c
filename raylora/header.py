"""What a run's LoRA file says about itself: the facts of job, base and dataset for its header."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from raylora.adapt.metadata import AdapterFacts
from raylora.base.seeds import sample_number
from raylora.base.version import VERSION
from raylora.data.dataset import Dataset
from raylora.data.rows import Rows
from raylora.data.steps import StepPlan
from raylora.families import Family
from raylora.job import Job

CLIP_TOKENS = 75
MOST_TAGS = 10_000
"""Tags of a folder that a file names; sentences of a million images would fill it."""


def adapter_facts(
    job: Job,
    family: Family,
    dataset: Dataset,
    plan: StepPlan,
    images: dict[str, Any],
    *,
    held_out: int,
    step: int,
    total_steps: int,
    started_at: float,
    now: float,
) -> AdapterFacts:
    """Facts of the file saved after `step` global steps.

    Args:
        images: the `image_facts`.
        held_out: how many images are measured and not trained on.
    """
    network, training = job.network, job.training
    data = job.sets[0]  # the header has room for one set's shape
    about = family.metadata
    reg = np.array([options.is_reg for options in job.sets])[dataset.rows.set]
    return AdapterFacts(
        raylora_version=VERSION,
        job_json=json.dumps(job.plain(), sort_keys=True),
        output_name=job.name,
        architecture=f"{about['modelspec.architecture']}/lora",
        base_model_version=about["ss_base_model_version"],
        prediction_type="v" if about["modelspec.prediction_type"] == "v" else "epsilon",
        resolution=data.resolution,
        rank=network.rank,
        alpha=network.alpha or network.rank,
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
        train_images=int(dataset.rows.repeats[~reg].sum()),
        reg_images=int(dataset.rows.repeats[reg].sum()),
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
        validate_every_steps=job.validation.every_steps if held_out else None,
        clip_skip=int(about["ss_clip_skip"]) if "ss_clip_skip" in about else None,
        max_token_length=_chunked(family.max_tokens),
        validation_images=held_out,
        validation_split=data.validation_split,
        prior_loss_weight=job.data.prior_loss_weight,
        resize_interpolation=data.resize_interpolation,
        cached_latents=not job.data.pictures_live,
        flip=data.flip_aug,
        color_aug=data.color_aug,
        random_crop=data.random_crop,
        shuffle_caption=data.shuffle_caption,
        keep_tokens=data.keep_tokens,
        caption_dropout_rate=data.caption_dropout_rate,
        caption_dropout_every_epochs=data.caption_dropout_every_n_epochs,
        tag_dropout_rate=data.caption_tag_dropout_rate,
        **images,
    )


def _chunked(tokens: int | None) -> int | None:
    """Only what is not CLIP's own length is named, as in sd-scripts."""
    return tokens if tokens and tokens > CLIP_TOKENS else None


def image_facts(job: Job, dataset: Dataset) -> dict[str, Any]:
    """Folders, tags and buckets, as sd-scripts' readers show them; the same for every save."""
    rows = dataset.rows
    roots = [PurePosixPath(folder).name for folder in dataset.facts.folders]
    folders: tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]] = ({}, {})
    tags: dict[str, Counter[str]] = {}
    for key, caption, of_set, repeats in zip(
        rows.keys.to_pylist(),
        rows.captions.to_pylist(),
        rows.set.tolist(),
        rows.repeats.tolist(),
        strict=True,
    ):
        options = job.sets[of_set]
        parent = PurePosixPath(key).parent.name or roots[of_set]
        of_kind = folders[options.is_reg]
        held = of_kind.setdefault(parent, {"n_repeats": repeats, "img_count": 0})
        held["img_count"] += 1
        words = [tag.strip() for tag in caption.split(options.caption_separator)]
        tags.setdefault(parent, Counter()).update(word for word in words if word)
    counts = rows.showings_by_bucket()
    buckets = {
        str(i): {"resolution": list(bucket), "count": counts[bucket]}
        for i, bucket in enumerate(sorted(counts))
    }
    return {
        "dataset_folders": folders[False],
        "reg_folders": folders[True],
        "tag_frequency": {
            folder: dict(counted.most_common(MOST_TAGS)) for folder, counted in tags.items()
        },
        "bucket_info": {"buckets": buckets, "mean_img_ar_error": ratio_error(rows)},
    }


def ratio_error(rows: Rows) -> float:
    """Mean distance between the aspect ratios of images and their buckets."""
    wanted = rows.original_size[:, 0] / rows.original_size[:, 1]
    found = rows.bucket[:, 0] / rows.bucket[:, 1]
    return float(np.abs(wanted - found).mean()) if len(rows) else 0.0
