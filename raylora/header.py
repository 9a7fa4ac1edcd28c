"""What a run's LoRA file says about itself: the facts of job, base and dataset for its header."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from raylora.adapt.metadata import AdapterFacts
from raylora.base.seeds import sample_number
from raylora.base.version import VERSION
from raylora.data.dataset import Dataset
from raylora.data.options import SetOptions
from raylora.data.rows import Rows
from raylora.data.steps import StepPlan
from raylora.diffusion.noise import trained_process
from raylora.diffusion.process import Flow
from raylora.diffusion.timesteps import TimestepOptions, base_shift
from raylora.families import Family
from raylora.job import Job
from raylora.networks.dylora import DyloraOptions
from raylora.networks.locon import LoconOptions
from raylora.networks.lycoris import LycorisOptions

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
    base_license: str = "",
    base_precision: str = "full",
) -> AdapterFacts:
    """Facts of the file saved after `step` global steps.

    Args:
        images: the `image_facts`.
        held_out: how many images are measured and not trained on.
        base_license: where it is known; `export.license` replaces it.
        base_precision: how the run holds the base, `memory.base`.
    """
    training = job.training
    about = family.metadata
    reg = np.array([options.is_reg for options in job.sets])[dataset.rows.set]
    return AdapterFacts(
        raylora_version=VERSION,
        job_json=json.dumps(job.plain(), sort_keys=True),
        output_name=job.name,
        architecture=f"{about['modelspec.architecture']}/lora",
        base_model_version=about["ss_base_model_version"],
        prediction_type=_prediction(job, family),
        is_sd2=about.get("ss_v2") == "True",
        family_words=_family_words(job, family),
        images_per_step=training.images_per_step,
        steps=step,
        epoch=-(-step // plan.steps_per_epoch),
        max_steps=total_steps,
        epochs=-(-total_steps // plan.steps_per_epoch),
        seed=job.seed,
        started_at=started_at,
        finished_at=now,
        session_id=sample_number(job.name + job.fingerprint(), 0) % 2**32,
        train_images=int(dataset.rows.repeats[~reg].sum()),
        reg_images=int(dataset.rows.repeats[reg].sum()),
        batches_per_epoch=plan.steps_per_epoch,
        base_name=about["ss_sd_model_name"],
        vae_name=PurePosixPath(job.family.vae).name if job.family.vae else None,
        base_precision=base_precision,
        gradient_checkpointing=job.memory.checkpointing in ("alternate", "all"),
        clip_skip=_skipped(int(about.get("ss_clip_skip", 1))),
        max_token_length=None if isinstance(family.process, Flow) else _chunked(family.max_tokens),
        timestep_range=_timestep_range(job, family),
        prior_loss_weight=job.data.prior_loss_weight,
        cached_latents=not job.data.pictures_live,
        **_export_facts(job, base_license),
        **_network_facts(job),
        **_rate_facts(job),
        **_loss_facts(job, family),
        **_noise_facts(job),
        **_validation_facts(job, held_out),
        **_set_facts(job.sets[0]),  # the header has room for one set's shape
        **images,
    )


def _prediction(job: Job, family: Family) -> Literal["epsilon", "v", ""]:
    process = trained_process(family.process, job.noise)
    if isinstance(process, Flow):
        return ""
    return "v" if process.prediction == "v_prediction" else "epsilon"


def _family_words(job: Job, family: Family) -> dict[str, Any]:
    """What sd-scripts writes for SD 3 and FLUX alone; the nearest of its own words."""
    if not isinstance(family.process, Flow):
        return {}
    own = {word.removeprefix("ss_"): value for word, value in family.metadata.items()}
    words: dict[str, Any] = {word: own[word] for word in _FAMILY_WORDS if word in own}
    timesteps = job.timesteps.with_usual(family.usual_draw, family.usual_shift)
    weight = job.loss.weight.name
    density = timesteps.draw if timesteps.draw in ("logit_normal", "mode") else "none"
    words |= {
        "weighting_scheme": weight if weight in ("sigma_sqrt", "cosmap") else density,
        "logit_mean": timesteps.mean,
        "logit_std": timesteps.std,
        "mode_scale": timesteps.mode_scale,
    }
    if "guidance_scale" not in words:  # of FLUX alone, as is what follows
        return words
    shift = base_shift(family.base.config("scheduler"))
    return {
        **words,
        "timestep_sampling": _sampling(timesteps),
        "sigmoid_scale": timesteps.sigmoid_scale,
        "model_prediction_type": "raw",
        "discrete_flow_shift": timesteps.shift if isinstance(timesteps.shift, float) else shift,
    }


_FAMILY_WORDS = ("model_type", "apply_t5_attn_mask", "apply_lg_attn_mask", "guidance_scale")


def _sampling(timesteps: TimestepOptions) -> str:
    """`--timestep_sampling` of sd-scripts; "sigma" is what it calls densities of its own there."""
    plain = timesteps.draw == "logit_normal" and (timesteps.mean, timesteps.std) == (0, 1)
    if timesteps.draw == "uniform" and timesteps.shift in (None, 1.0):
        return "uniform"
    if timesteps.draw != "sigmoid" and not plain:
        return "sigma"
    if timesteps.shift == "resolution":
        return "flux_shift"
    return "sigmoid" if timesteps.shift in (None, 1.0) else "shift"


def _timestep_range(job: Job, family: Family) -> tuple[int, int] | None:
    """Only what is not all of them is named, as in sd-scripts."""
    low, high = job.training.min_timestep, job.training.max_timestep
    if not low and high is None:
        return None
    return low, family.process.steps if high is None else high


def _export_facts(job: Job, base_license: str) -> dict[str, Any]:
    export = job.export
    return {
        "title": export.title or job.name,
        "author": export.author or "",
        "description": export.description or "",
        "license": export.license or base_license,
        "tags": ", ".join(export.tags),
        "trigger_phrase": export.trigger_phrase or "",
        "usage_hint": export.usage_hint or "",
        "comment": export.comment,
        "minimal": export.metadata == "minimal",
    }


def _network_facts(job: Job) -> dict[str, Any]:
    network = job.network
    from_file = network.initial_ranks
    return {
        "rank": None if from_file else network.rank,
        "alpha": None if from_file else network.alpha or network.rank,
        "network_module": _network_module(job),
        "network_args": _network_args(job),
        "network_dropout": network.dropout or None,
        "scale_weight_norms": network.max_norm,
    }


def _network_module(job: Job) -> str:
    """`--network_module` of sd-scripts that makes such a file; LyCORIS' where its own do not."""
    kind = job.network.kind
    if kind == "dylora":
        return "networks.dylora"
    if kind not in ("lora", "locon"):
        return "lycoris.kohya"
    own = {"sd3": "networks.lora_sd3", "flux1": "networks.lora_flux"}
    return own.get(job.family.layout, "networks.lora")


_LYCORIS = {
    "dora": {"algo": "lora", "dora_wd": "True"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr"},
    "oft": {"algo": "diag-oft"},
}
"""LyCORIS' words for networks that sd-scripts does not have."""


def _network_args(job: Job) -> dict[str, str]:
    """`--network_args` of sd-scripts that say the same; text each, as from its command line."""
    network, optimizer = job.network, job.optimizer
    blocks = optimizer.block_rates
    words: dict[str, Any] = {
        "rank_dropout": network.rank_dropout or None,
        "module_dropout": network.module_dropout or None,
        "loraplus_lr_ratio": optimizer.lora_plus_ratio,
        "loraplus_unet_lr_ratio": optimizer.lora_plus_denoiser_ratio,
        "loraplus_text_encoder_lr_ratio": optimizer.lora_plus_text_encoder_ratio,
        "down_lr_weight": blocks.down,
        "mid_lr_weight": blocks.mid,
        "up_lr_weight": blocks.up,
        "block_lr_zero_threshold": blocks.zero_threshold or None,
        "train_double_block_indices": network.blocks.get("double"),
        "train_single_block_indices": network.blocks.get("single"),
        "train_block_indices": network.blocks.get("joint"),
    }
    lists = {
        "block_dims": network.block_ranks,
        "block_alphas": network.block_alphas,
        "conv_block_dims": network.conv_block_ranks,
        "conv_block_alphas": network.conv_block_alphas,
    }
    words |= {word: held for word, held in lists.items() if isinstance(held, tuple)}
    if isinstance(network, LoconOptions):
        conv_rank = network.conv_rank or network.rank
        words |= {"conv_dim": conv_rank, "conv_alpha": network.conv_alpha or conv_rank}
    if isinstance(network, DyloraOptions):
        words["unit"] = network.unit
    if isinstance(network, LycorisOptions):
        norms = network.algo == "norms"
        words |= {"algo": "lora", "train_norm": "True"} if norms else {"algo": network.algo}
    words |= _LYCORIS.get(network.kind, {})
    return {word: _typed(value) for word, value in words.items() if value is not None}


def _typed(value: Any) -> str:
    """As a person would type it."""
    if isinstance(value, list | tuple):
        return ",".join(map(_typed, value))
    return value if isinstance(value, str) else f"{value:g}"


def _rate_facts(job: Job) -> dict[str, Any]:
    optimizer, network = job.optimizer, job.network
    precision = job.training.precision
    return {
        "learning_rate": optimizer.rate,
        "unet_rate": optimizer.rates_of("denoiser")[0] if network.trains_denoiser else None,
        "text_encoder_rates": optimizer.text_rates if network.trains_text else None,
        "optimizer": optimizer.spelled,
        "schedule": job.schedule.name.replace(":", "."),
        "warmup_steps": job.schedule.warmup_steps,
        "max_grad_norm": optimizer.max_grad_norm,
        "mixed_precision": precision if precision in ("fp16", "bf16") else "no",
    }


def _loss_facts(job: Job, family: Family) -> dict[str, Any]:
    loss = job.loss
    return {
        "loss": loss.name,
        "huber_schedule": loss.schedule_for(family.process),
        "huber_c": loss.huber_c,
        "huber_scale": loss.huber_scale,
        "min_snr_gamma": loss.weight.gamma if loss.weight.name == "min_snr" else None,
        "debiased_estimation": loss.weight.name == "debiased",
    }


def _noise_facts(job: Job) -> dict[str, Any]:
    """What is off is None in sd-scripts, not 0."""
    noise = job.noise
    return {
        "zero_terminal_snr": noise.zero_terminal_snr,
        "noise_offset": noise.offset or None,
        "noise_offset_random": noise.offset_random,
        "adaptive_noise_scale": noise.adaptive_scale or None,
        "multires_noise_iterations": noise.multires_iterations or None,
        "multires_noise_discount": noise.multires_discount,
        "ip_noise_gamma": noise.input_perturbation or None,
        "ip_noise_gamma_random": noise.input_perturbation_random,
    }


def _validation_facts(job: Job, held_out: int) -> dict[str, Any]:
    split = job.sets[0].validation_split
    return {
        "validation_images": held_out,
        "validation_split": split,
        "validation_seed": job.sets[0].validation_seed if split else None,
        "validate_every_steps": job.validation.every_steps if held_out else None,
        "validate_every_epochs": job.validation.every_epochs if held_out else None,
    }


def _set_facts(data: SetOptions) -> dict[str, Any]:
    face = data.face_crop_aug_range
    return {
        "resolution": data.resolution,
        "enable_bucket": data.enable_bucket,
        "bucket_no_upscale": data.bucket_no_upscale,
        "min_bucket_reso": data.min_bucket_reso,
        "max_bucket_reso": data.max_bucket_reso,
        "resize_interpolation": data.resize_interpolation,
        "flip": data.flip_aug,
        "color_aug": data.color_aug,
        "random_crop": data.random_crop,
        "face_crop": _typed(face) if face else None,
        "shuffle_caption": data.shuffle_caption,
        "keep_tokens": data.keep_tokens,
        "caption_dropout_rate": data.caption_dropout_rate,
        "caption_dropout_every_epochs": data.caption_dropout_every_n_epochs,
        "tag_dropout_rate": data.caption_tag_dropout_rate,
    }


def _chunked(tokens: int | None) -> int | None:
    """Only what is not CLIP's own length is named, as in sd-scripts."""
    return tokens if tokens and tokens > CLIP_TOKENS else None


def _skipped(layer: int) -> int | None:
    """Likewise: CLIP's last layer is what is taken where nothing is skipped."""
    return layer if layer > 1 else None


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
