"""The words in a LoRA file's header: sd-scripts' ss_*, ModelSpec 1.0.1, and raylora's whole job.

Pure: times, hashes and versions are handed in, so the same facts give the same header anywhere.
Every value is text; numbers, booleans and "nothing" are what Python's `str` makes of them, since
that is what the programs that read these words expect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

_MODELSPEC_VERSION = "1.0.1"
# What sd-scripts keeps with --no_metadata; ModelSpec's words it writes all the same.
_MINIMAL = (
    "v2",
    "base_model_version",
    "network_module",
    "network_dim",
    "network_alpha",
    "network_args",
)


@dataclass(frozen=True)
class AdapterFacts:
    """What a header says of one saved adapter; handed over by whoever knows the job and the run.

    None and False are what sd-scripts writes of what is off.

    Attributes:
        raylora_version, job_json: the program and the whole job, from which it can be run again.
        architecture: ModelSpec's id of the base with "/lora", e.g. "stable-diffusion-v1/lora".
        base_model_version: sd-scripts' word for the family, e.g. "sd_v1".
        prediction_type: what the base predicts, "epsilon" or "v"; "" of flow models, for which
            ModelSpec has no word.
        resolution: (width, height) in pixels.
        rank, alpha: of most modules; None where a file to start from chose them.
        network_module, network_args: sd-scripts' words for the network; all text, as it has them
            from its command line.
        text_encoder_rates: None where it is not trained.
        images_per_step: of the global step; workers share it, so it names no machine.
        steps, epoch: done when this file was saved; max_steps, epochs: asked for.
        started_at, finished_at: seconds since 1970.
        session_id: any number that all checkpoints of one run share.
        base_name, base_hash, base_sha256: of the base's file; "" where it is a folder.
        vae_name: of a VAE that is not the base's.
        base_precision: how the frozen linears were held, `memory.base`; "full" as mixed_precision
            says.
        face_crop: "lowest,highest", as sd-scripts' option is written.
        timestep_range: lowest and one past the highest; None is all of them.
        family_words: what sd-scripts writes for this family alone, without "ss_".
        minimal: only the words by which other programs tell what kind of file it is.
        dataset_folders: folder -> {"n_repeats": ..., "img_count": ...}; also `reg_folders`.
        tag_frequency: folder -> {tag: count}.
        bucket_info: {"buckets": {index: {"resolution": [w, h], "count": n}}, "mean_img_ar_error"}.
    """

    raylora_version: str
    job_json: str
    output_name: str
    architecture: str
    base_model_version: str
    prediction_type: Literal["epsilon", "v", ""]
    resolution: tuple[int, int]
    rank: int | None
    alpha: float | None
    images_per_step: int
    steps: int
    epoch: int
    max_steps: int
    epochs: int
    seed: int
    learning_rate: float
    optimizer: str
    schedule: str
    started_at: float
    finished_at: float
    session_id: int
    train_images: int
    batches_per_epoch: int
    # from here on: known to some runs only
    title: str = ""
    author: str = ""
    description: str = ""
    license: str = ""
    tags: str = ""
    trigger_phrase: str = ""
    usage_hint: str = ""
    family_words: Mapping[str, Any] = field(default_factory=dict)
    minimal: bool = False
    comment: str | None = None
    base_name: str = ""
    base_hash: str = ""
    base_sha256: str = ""
    vae_name: str | None = None
    implementation: str = "diffusers"
    is_sd2: bool = False
    network_module: str = "networks.lora"
    network_args: Mapping[str, Any] = field(default_factory=dict)
    network_dropout: float | None = None
    unet_rate: float | None = None
    text_encoder_rates: tuple[float, ...] | None = None
    warmup_steps: float = 0
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    base_precision: str = "full"
    gradient_checkpointing: bool = False
    cached_latents: bool = True
    clip_skip: int | None = None
    max_token_length: int | None = None
    validation_images: int = 0
    validation_seed: int | None = None
    validation_split: float = 0.0
    validate_every_steps: int | None = None
    validate_every_epochs: int | None = None
    reg_images: int = 0
    prior_loss_weight: float = 1.0
    loss: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    min_snr_gamma: float | None = None
    debiased_estimation: bool = False
    zero_terminal_snr: bool = False
    timestep_range: tuple[int, int] | None = None
    noise_offset: float | None = None
    noise_offset_random: bool = False
    adaptive_noise_scale: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random: bool = False
    scale_weight_norms: float | None = None
    enable_bucket: bool = True
    bucket_no_upscale: bool = False
    min_bucket_reso: int | None = 256
    max_bucket_reso: int | None = 1024
    resize_interpolation: str | None = None
    flip: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop: str | None = None
    shuffle_caption: bool = False
    keep_tokens: int = 0
    caption_dropout_rate: float = 0.0
    caption_dropout_every_epochs: int = 0
    tag_dropout_rate: float = 0.0
    dataset_folders: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    reg_folders: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    bucket_info: Mapping[str, Any] = field(default_factory=dict)


def adapter_metadata(facts: AdapterFacts) -> dict[str, str]:
    """The header's words, but for the hashes, which `adapter_bytes` adds."""
    spec = {f"modelspec.{word}": value for word, value in _modelspec(facts).items() if value}
    words = {**_run(facts), **_network(facts), **_loss(facts), **_dataset(facts)}
    words |= facts.family_words
    if facts.minimal:
        kept = {word: words[word] for word in _MINIMAL if word in words}
        return {**{f"ss_{word}": str(value) for word, value in kept.items()}, **spec}
    return {
        **{f"ss_{word}": str(value) for word, value in words.items()},
        **spec,
        "raylora.version": facts.raylora_version,
        "raylora.job": facts.job_json,
        "raylora.base_precision": facts.base_precision,
    }


def _run(facts: AdapterFacts) -> dict[str, Any]:
    return {
        "session_id": facts.session_id,
        "training_started_at": facts.started_at,
        "training_finished_at": facts.finished_at,
        "output_name": facts.output_name,
        "training_comment": facts.comment,
        # What sd-scripts itself writes where it has no commit: it did not make this file.
        "sd_scripts_commit_hash": "(unknown)",
        "seed": facts.seed,
        "steps": facts.steps,
        "epoch": facts.epoch,
        "max_train_steps": facts.max_steps,
        "num_epochs": facts.epochs,
        "num_batches_per_epoch": facts.batches_per_epoch,
        # A global step has no per-device share that belongs to the job; see `images_per_step`.
        "batch_size_per_device": facts.images_per_step,
        "total_batch_size": facts.images_per_step,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": facts.gradient_checkpointing,
        "mixed_precision": facts.mixed_precision,
        "full_fp16": False,
        "fp8_base": facts.base_precision == "fp8",
        "fp8_base_unet": False,
        "lowram": False,
        "learning_rate": facts.learning_rate,
        "unet_lr": facts.unet_rate,
        # sd-scripts takes one for each text encoder, so it is a list there.
        "text_encoder_lr": facts.text_encoder_rates and list(facts.text_encoder_rates),
        "optimizer": facts.optimizer,
        "lr_scheduler": facts.schedule,
        "lr_warmup_steps": facts.warmup_steps,
        "max_grad_norm": facts.max_grad_norm,
        "validation_seed": facts.validation_seed,
        "validation_split": facts.validation_split,
        "max_validation_steps": None,
        "validate_every_n_epochs": facts.validate_every_epochs,
        "validate_every_n_steps": facts.validate_every_steps,
    }


def _network(facts: AdapterFacts) -> dict[str, Any]:
    words = {
        "network_module": facts.network_module,
        "network_dim": facts.rank,
        "network_alpha": facts.alpha,
        "network_dropout": facts.network_dropout,
        "scale_weight_norms": facts.scale_weight_norms,
        "v2": facts.is_sd2,
        "base_model_version": facts.base_model_version,
        "clip_skip": facts.clip_skip,
        "max_token_length": facts.max_token_length,
        "sd_model_name": facts.base_name,
        "sd_model_hash": facts.base_hash,
        "new_sd_model_hash": facts.base_sha256,
    }
    if facts.network_args:
        words["network_args"] = _json(facts.network_args)
    if facts.vae_name is not None:
        words["vae_name"] = facts.vae_name
    return words


def _loss(facts: AdapterFacts) -> dict[str, Any]:
    return {
        "loss_type": facts.loss,
        "huber_schedule": facts.huber_schedule,
        "huber_c": facts.huber_c,
        "huber_scale": facts.huber_scale,
        "min_snr_gamma": facts.min_snr_gamma,
        "debiased_estimation": facts.debiased_estimation,
        "zero_terminal_snr": facts.zero_terminal_snr,
        "noise_offset": facts.noise_offset,
        "noise_offset_random_strength": facts.noise_offset_random,
        "adaptive_noise_scale": facts.adaptive_noise_scale,
        "multires_noise_iterations": facts.multires_noise_iterations,
        "multires_noise_discount": facts.multires_noise_discount,
        "ip_noise_gamma": facts.ip_noise_gamma,
        "ip_noise_gamma_random_strength": facts.ip_noise_gamma_random,
        "prior_loss_weight": facts.prior_loss_weight,
    }


def _dataset(facts: AdapterFacts) -> dict[str, Any]:
    return {
        "num_train_images": facts.train_images,
        "num_reg_images": facts.reg_images,
        "num_validation_images": facts.validation_images,
        "resolution": facts.resolution,
        "enable_bucket": facts.enable_bucket,
        "bucket_no_upscale": facts.bucket_no_upscale,
        "min_bucket_reso": facts.min_bucket_reso,
        "max_bucket_reso": facts.max_bucket_reso,
        "resize_interpolation": facts.resize_interpolation,
        "cache_latents": facts.cached_latents,
        "flip_aug": facts.flip,
        "color_aug": facts.color_aug,
        "random_crop": facts.random_crop,
        "face_crop_aug_range": facts.face_crop,
        "shuffle_caption": facts.shuffle_caption,
        "keep_tokens": facts.keep_tokens,
        "caption_dropout_rate": facts.caption_dropout_rate,
        "caption_dropout_every_n_epochs": facts.caption_dropout_every_epochs,
        "caption_tag_dropout_rate": facts.tag_dropout_rate,
        "dataset_dirs": _json(facts.dataset_folders),
        "reg_dataset_dirs": _json(facts.reg_folders),
        "tag_frequency": _json(facts.tag_frequency),
        "bucket_info": _json(facts.bucket_info),
    }


def _modelspec(facts: AdapterFacts) -> dict[str, str]:
    """ModelSpec's words; empty ones are left out, as the specification wants.

    Source: https://github.com/Stability-AI/ModelSpec
    """
    width, height = facts.resolution
    low_high = facts.timestep_range
    return {
        "sai_model_spec": _MODELSPEC_VERSION,
        "architecture": facts.architecture,
        "implementation": facts.implementation,
        "implementation_version": f"raylora/{facts.raylora_version}",
        "title": facts.title or facts.output_name,
        "resolution": f"{width}x{height}",
        "date": datetime.fromtimestamp(int(facts.finished_at), UTC).isoformat(),
        "prediction_type": facts.prediction_type,
        "timestep_range": "" if low_high is None else f"{low_high[0]},{low_high[1]}",
        "encoder_layer": "" if facts.clip_skip is None else str(facts.clip_skip),
        "author": facts.author,
        "description": facts.description,
        "license": facts.license,
        "tags": facts.tags,
        "trigger_phrase": facts.trigger_phrase,
        "usage_hint": facts.usage_hint,
    }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
