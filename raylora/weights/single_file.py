"""One .safetensors file: a whole checkpoint with its makers' names, or one component."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from raylora.base.errors import WeightsError
from raylora.base.fetch import local_file
from raylora.weights.folder import FolderSource
from raylora.weights.hub import HubRepository
from raylora.weights.original_names import (
    Weights,
    below,
    clip_weights,
    flux_weights,
    sd3_weights,
    unet_weights,
    vae_weights,
)
from raylora.weights.recognise import Recognised, recognise
from raylora.weights.short_names import SHORT_NAMES
from raylora.weights.source import Source, file_metadata, mapped_tensors
from raylora.weights.true_configs import Configs, true_configs

_DENOISERS = {"flux1": "transformer", "sd3": "transformer"}
_VAES = ("first_stage_model.", "vae.")
_PREFIXES = {
    "text_encoder": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    "vae": _VAES,
}
_SECOND = {
    "sdxl": ("conditioner.embedders.1.model.",),
    "sd3": ("text_encoders.clip_g.transformer.",),
    "flux1": ("text_encoders.t5xxl.transformer.",),
}
_THIRD = {"sd3": ("text_encoders.t5xxl.transformer.",)}
_CLIP_MARKS = (
    "text_model.final_layer_norm.weight",
    "final_layer_norm.weight",
    "ln_final.weight",
)
_T5_MARKS = ("encoder.final_layer_norm.weight",)
_MARKS = {
    "vae": ("decoder.conv_in.weight",),
    "text_encoder": _CLIP_MARKS,
    "text_encoder_2": (*_CLIP_MARKS, *_T5_MARKS),
    "text_encoder_3": _T5_MARKS,
    "unet": ("input_blocks.0.0.weight", "conv_in.weight"),
    "transformer": (
        "double_blocks.0.img_attn.qkv.weight",
        "joint_blocks.0.x_block.attn.qkv.weight",
        "transformer_blocks.0.attn.to_q.weight",
    ),
}
"""A tensor that a file of each component has, by one of its names."""


def open_checkpoint(url: str, *, kind: str, configs: Source | None) -> CheckpointFile:
    """A whole checkpoint, or a denoiser alone.

    Args:
        configs: `family.parts.config`, for models of other sizes than the usual bases'.
    """
    return CheckpointFile(local_file(url), kind=kind, configs=configs)


class CheckpointFile(Source):
    """A checkpoint with its makers' names: "model.diffusion_model.input_blocks...."."""

    def __init__(self, path: Path, *, kind: str, configs: Source | None) -> None:
        self._path = path
        self._configs = configs
        self.name = path.stem
        self._tensors = mapped_tensors(path)
        metadata = file_metadata(path)
        self.license = metadata.get("modelspec.license")
        self._found: Recognised = recognise(path.name, self._tensors, metadata, kind)

    @cached_property
    def _true_configs(self) -> Configs:
        found = true_configs(self._found.usual)
        for component, changes in self._found.changes.items():
            found[component] |= changes
        return found

    def has(self, component: str) -> bool:
        """Whether its tensors are in the file; how noise is scheduled is told from them."""
        return component == "scheduler" or bool(self._own(component))

    def config(self, component: str) -> dict[str, Any]:
        """Of `family.parts.config`, else the usual base's."""
        if self._configs is not None and self._configs.has(component):
            return self._configs.config(component)
        found = self._true_configs.get(component)
        if found is None:
            raise WeightsError(f"{self._path.name}: {self._found.kind} has no {component}.")
        return found

    def weights(self, component: str) -> Weights:
        """By diffusers' or transformers' names."""
        held = self._own(component)
        if not held:
            word = "family.vae" if component == "vae" else f"family.parts.{component}"
            raise WeightsError(
                f"{self._path.name} has no {component}. Set {word}: a folder or a .safetensors "
                "file, local or s3://, or a model hub's id."
            )
        return component_weights(component, held, self.config(component))

    def files(self, component: str) -> list[Path]:
        """The checkpoint."""
        return [self._path]

    def tokenizer(self, component: str) -> Path:
        """Of `family.parts.config`, else of the usual base's repository at the model hub."""
        if self._configs is not None:
            return self._configs.tokenizer(component)
        usual = SHORT_NAMES[self._found.usual]
        word = f"family.parts.{component}"
        place = HubRepository(usual.repository, word=word)
        try:
            return FolderSource(place, word=word).tokenizer(component)
        except WeightsError as error:
            raise WeightsError(
                f"{self._path.name} holds no {component}, as no single file does, and that of "
                f"{usual.repository} is not to be had ({error}). Set {word} to a folder with the "
                "tokenizer's files."
            ) from error

    def _own(self, component: str) -> dict[str, Tensor]:
        """The component's tensors by the makers' names, without the prefix."""
        kind = self._found.kind
        if component == _DENOISERS.get(kind, "unet"):
            return self._found.denoiser
        prefixes = _PREFIXES.get(component, ())
        if component == "text_encoder_2":
            prefixes = _SECOND.get(kind, ())
        if component == "text_encoder_3":
            prefixes = _THIRD.get(kind, ())
        return next((held for one in prefixes if (held := below(self._tensors, one))), {})


class ComponentFile(Source):
    """One component alone: ae.safetensors, clip_l.safetensors, t5xxl_fp16.safetensors, ...

    Args:
        configs: has the component's config.
    """

    def __init__(self, url: str, component: str, *, word: str, configs: Source) -> None:
        self._component = component
        self._configs = configs
        self._path = local_file(url, word=word)
        self.name = self._path.stem
        held = mapped_tensors(self._path)
        prefixes = ("model.diffusion_model.", *_VAES)
        self._held = next((found for one in prefixes if (found := below(held, one))), held)
        _check(self._path.name, component, self._held, word)

    def has(self, component: str) -> bool:
        """Whether it is that one."""
        return component == self._component

    def config(self, component: str) -> dict[str, Any]:
        """The base's."""
        return self._configs.config(component)

    def weights(self, component: str) -> Weights:
        """By diffusers' or transformers' names."""
        return component_weights(component, self._held, self.config(component))

    def files(self, component: str) -> list[Path]:
        """The file."""
        return [self._path]

    def tokenizer(self, component: str) -> Path:
        """None: it is a model's file."""
        raise WeightsError(
            f"family.parts.{component}: {self._path.name} is one file, and a tokenizer is a "
            "folder. Give that."
        )


def _check(name: str, component: str, held: dict[str, Tensor], word: str) -> None:
    """WeightsError where a file is of another component."""
    if not any(mark in held for mark in _MARKS.get(component, ())):
        first = ", ".join(sorted(held)[:3])
        raise WeightsError(
            f"{word}: {name} holds no {component} (its first tensors: {first}). Give the file of "
            "that component."
        )


def component_weights(component: str, held: dict[str, Tensor], config: dict[str, Any]) -> Weights:
    """A component by diffusers' or transformers' names, whose names they may be already."""
    if "double_blocks.0.img_attn.qkv.weight" in held:
        return flux_weights(held)
    if "joint_blocks.0.x_block.attn.qkv.weight" in held:
        return sd3_weights(held)
    if "input_blocks.0.0.weight" in held:
        return unet_weights(held, config)
    if component == "vae":
        return vae_weights(held, config)
    if component.startswith("text_encoder") and "d_model" not in config:
        return clip_weights(held, config)
    return dict(held)
