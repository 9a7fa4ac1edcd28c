"""Options of the LoRA file that a run leaves behind."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raylora.base.options import Options, known_as


class ExportOptions(Options):
    """The LoRA file."""

    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float16", json_schema_extra=known_as(sd_scripts="--save_precision (float, fp16, bf16)")
    )
    """Numbers in the file; alpha is always float32."""
    naming: Literal["kohya", "diffusers"] = Field(
        "kohya",
        json_schema_extra=known_as(
            formula="kohya: lora_unet_….lora_down.weight, .lora_up.weight, .alpha; diffusers: "
            "unet.….lora_A.weight, .lora_B.weight, alpha / rank within the weights",
            guides="PEFT format",
        ),
    )
    """Names in the file. kohya is read by every program that takes LoRAs; diffusers is for programs
    built on diffusers and peft. raylora reads both."""
    metadata: Literal["full", "minimal"] = Field(
        "full", json_schema_extra=known_as(sd_scripts="--no_metadata is minimal")
    )
    """What the header tells. full: the whole job, from which the run can be repeated, with folder
    names and tags. minimal: which base and which network, and what `export` says here."""
    title: str | None = Field(None, json_schema_extra=known_as(sd_scripts="--metadata_title"))
    """modelspec.title; null is the run's name."""
    author: str | None = Field(None, json_schema_extra=known_as(sd_scripts="--metadata_author"))
    """modelspec.author."""
    description: str | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--metadata_description")
    )
    """modelspec.description: what it draws, in a sentence or two."""
    license: str | None = Field(None, json_schema_extra=known_as(sd_scripts="--metadata_license"))
    """modelspec.license; null is the base's, where the README.md in its folder names one, since a
    LoRA derives from its base."""
    tags: tuple[str, ...] = Field(
        (), json_schema_extra=known_as(sd_scripts="--metadata_tags (with commas between)")
    )
    """modelspec.tags: words under which galleries list it."""
    trigger_phrase: str | None = Field(
        None,
        json_schema_extra=known_as(sd_scripts="--metadata_trigger_phrase", guides="trigger word"),
    )
    """modelspec.trigger_phrase: what a prompt has to say so that it acts."""
    usage_hint: str | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--metadata_usage_hint")
    )
    """modelspec.usage_hint: what else helps whoever uses it, such as a good strength."""
    comment: str | None = Field(None, json_schema_extra=known_as(sd_scripts="--training_comment"))
    """ss_training_comment: a note about the training."""
