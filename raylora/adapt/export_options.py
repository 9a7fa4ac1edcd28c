"""Options of the LoRA file that a run leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from raylora.base.options import Options, known_as
from raylora.networks import NetworkOptions, get_network
from raylora.networks.dora import DoraOptions
from raylora.networks.locon import LoconOptions
from raylora.networks.lycoris import LycorisOptions


class ExportOptions(Options):
    """The LoRA file."""

    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float16", json_schema_extra=known_as(sd_scripts="--save_precision (float, fp16, bf16)")
    )
    """Numbers in the file; alpha is always float32."""
    naming: Literal["kohya", "diffusers", "comfyui"] = Field(
        "kohya",
        json_schema_extra=known_as(
            formula="kohya: lora_unet_….lora_down.weight, .lora_up.weight, .alpha; diffusers: "
            "unet.… or transformer.….lora_A.weight, .lora_B.weight, alpha / rank within the "
            "weights; comfyui: diffusion_model.… in kohya's words",
            guides="PEFT format",
        ),
    )
    """Names in the file. kohya is read by nearly every program that takes LoRAs; diffusers is for
    programs built on diffusers and peft, and the one to choose for SD 3 there; comfyui has the
    names of the model's makers, for SDXL, SD 3 and FLUX. raylora reads all of them."""
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


def naming_problems(export: ExportOptions, network: NetworkOptions, family: str) -> Iterator[str]:
    """Files that no program would read as they are meant, a sentence each.

    Args:
        family: `family.kind`.
    """
    naming = f"export.naming is {export.naming}"
    if export.naming == "diffusers":
        if network.kind != "dora" and not get_network(network.kind).low_rank:
            yield (
                f"{naming}, and diffusers has no names for {network.kind}. Set it to kohya, which "
                "ComfyUI and others read."
            )
        if isinstance(network, LoconOptions) and network.tucker:
            yield (
                f"{naming}, and diffusers has no name for the third factor of network.tucker. Set "
                "it to kohya, or network.tucker to false."
            )
        if isinstance(network, DoraOptions) and network.axis == "input":
            yield (
                f"{naming}, and diffusers reads DoRA's lengths by outputs only. Set network.axis "
                "to output, or export.naming to kohya."
            )
    if export.naming == "comfyui":
        if family in ("sd15", "sd2"):
            yield (
                f"{naming}, and for {family} ComfyUI reads kohya's names. Set it to kohya: that is "
                "the same file for both."
            )
        if isinstance(network, LycorisOptions) and network.algo == "ia3":
            yield f"{naming}, and ComfyUI does not read ia3. Set it to kohya, for LyCORIS' reader."
