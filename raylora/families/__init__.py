"""The contract of a model family: what one file in this folder gives.

A file `families/<kind>.py` defines

    class <Kind>Options(FamilyOptions): kind: Literal["<kind>"] = "<kind>" ...
    family: type[Family]

and its name is the word in the YAML (`family.kind`). Everything that differs between SD 1.5, SDXL
and FLUX is behind `Family`; nothing else asks which family it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raylora.base.encoder import Encoder
from raylora.base.lookup import load_plugin
from raylora.base.options import Options, known_as
from raylora.base.site import Site
from raylora.diffusion.process import Process
from raylora.diffusion.samplers import DrawNoise, Sampler

Models = Mapping[str, nn.Module]
"""Component -> model."""


class BaseLora(Options):
    """A LoRA that becomes part of the base."""

    file: str
    """The LoRA file, local or s3://."""
    strength: float = 1.0
    """How much of it; 1 is as it was trained."""


class FamilyOptions(Options):
    """Which base model.

    Attributes:
        native_resolution: side in pixels of the square pictures that the family's bases were
            trained on; what a job gets that names no resolution.
        bucket_step: sides of buckets are multiples of this many pixels where a job names no other.
    """

    native_resolution: ClassVar[int]
    bucket_step: ClassVar[int]

    kind: str
    """The model family: the name of a file in raylora/families."""
    weights: str
    """The base: a folder in diffusers layout, local or s3://."""
    vae: str | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--vae", guides="external VAE")
    )
    """Another VAE than the base's: a folder in diffusers layout, local or s3://."""
    loras: tuple[BaseLora, ...] = Field(
        (),
        json_schema_extra=known_as(
            formula="W + strength * alpha / rank * up down, for each file",
            sd_scripts="--base_weights, --base_weights_multiplier",
        ),
    )
    """LoRA files that are merged into the base before anything is encoded, trained or drawn."""


class Family(ABC):
    """One base model, its parts loaded when they are asked for.

    Attributes:
        folder: where the base lies on this machine.
        component: the denoiser's name in exported files, "unet" or "transformer".
        process: how latents are noised and what is predicted.
        pixels_per_latent: how many pixels one latent cell spans.
        size_step: image sides must be multiples of this many pixels.
        metadata: facts for the file's header (ss_base_model_version, modelspec names, ss_clip_skip
            where it means something ...).
        max_tokens: tokens of a caption that are read; what is longer is cut off. None where the
            family has no such limit to choose.
        longer_tokens: the larger values that `family.max_tokens` may be set to, rising.
        text_bytes: size of one caption in the cache, for estimates.
        alter: what is done to each model once it is loaded, by component: LoRAs merged into it.
        altered: component -> what names that; part of fingerprints and of the cache's names.
    """

    folder: Path
    component: str
    process: Process
    pixels_per_latent: int
    latent_channels: int
    size_step: int
    metadata: dict[str, str]
    max_tokens: int | None
    longer_tokens: tuple[int, ...]
    text_bytes: int
    alter: Callable[[str, nn.Module], None] = staticmethod(lambda component, model: None)
    altered: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def __init__(self, folder: Path, options: Any) -> None:
        """Read the configs, not the weights. WeightsError when the folder is not this family."""

    @abstractmethod
    def load_denoiser(self, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The frozen denoiser, ready to be adapted."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Names the denoiser by its weights, without reading all of them; a run keeps to one."""

    @abstractmethod
    def encoder_facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(latents_facts, text_facts) without loading a model."""

    @abstractmethod
    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, uncut and without the first and the last; loads no weights.

        More than `max_tokens` are not read. Syntax that is no part of the text is not counted.
        """

    @abstractmethod
    def latents_bytes(self, bucket: tuple[int, int]) -> int:
        """Size of one picture in the cache, for estimates; bucket is (width, height) in pixels."""

    @abstractmethod
    def load_encoder(self, *, device: torch.device) -> Encoder:
        """VAE and text encoders for the cache, in float32."""

    @abstractmethod
    def skeletons(self) -> tuple[nn.Module, Models]:
        """The denoiser and the text encoders on the meta device, to look at their layers."""

    @abstractmethod
    def load_text_encoders(self, *, dtype: torch.dtype, device: torch.device) -> Models:
        """The frozen text encoders by component ("text_encoder", …), ready to be adapted."""

    @abstractmethod
    def tokens(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        """What `read_tokens` reads of captions, each with B first; loads no weights."""

    @abstractmethod
    def read_tokens(self, text_encoders: Models, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The conditions of `predict` from tokens, differentiable; as `load_encoder` gives them."""

    @abstractmethod
    def sites(self, denoiser: nn.Module, layers: str, *, convolutions: bool = False) -> list[Site]:
        """The denoiser's layers that `network.layers` means, in the order of the model.

        Args:
            convolutions: also those of the residual blocks and the samplers, as LoCon trains them.
        """

    @abstractmethod
    def text_sites(self, text_encoders: Models, layers: str) -> list[Site]:
        """The text encoders' layers, likewise."""

    @abstractmethod
    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Tensor],
    ) -> Tensor:
        """The denoiser's prediction, (B, C, H, W); conditions are the cached text tensors."""

    def checkpoint_blocks(self, denoiser: nn.Module, text_encoders: Models) -> None:
        """Have blocks computed again in the backward pass instead of kept; same numbers."""
        denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=_again)  # type: ignore[operator]
        for encoder in text_encoders.values():
            encoder.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
            )
            encoder.train()  # transformers look at it; CLIP has no dropout of its own

    @abstractmethod
    def load_renderer(self, denoiser: nn.Module, text_encoders: Models | None = None) -> Renderer:
        """Text-to-image with this (possibly adapted) denoiser, for previews.

        Args:
            text_encoders: those that carry an adapter; None loads the base's own.
        """


class Renderer(Protocol):
    """Draws one picture with the models it was made of."""

    def render(
        self,
        prompt: str,
        *,
        negative: str,
        latents: Tensor,
        steps: int,
        guidance: float,
        sampler: Sampler = "ddim",
        noise: DrawNoise | None = None,
        process: Process | None = None,
    ) -> NDArray[np.uint8]:
        """A picture (H, W, 3).

        Args:
            latents: (1, C, h, w), standard normal.
            noise: for samplers that draw, which euler_a and dpm_2_a are.
            process: what was trained, where that is not what the base was.
        """


def _again(module: nn.Module, *inputs: Any) -> Any:
    """A block of diffusers', computed again for its gradients. Nothing in it draws."""
    return checkpoint(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def site_of(name: str, module: nn.Module, *, block: int | None = None) -> Site | None:
    """The place that a layer is; None where no adapter can sit."""
    if isinstance(module, nn.Linear):
        return Site(name, "linear", module.in_features, module.out_features, block=block)
    if isinstance(module, nn.Conv2d):
        assert isinstance(module.padding, tuple)
        return Site(
            name,
            "conv",
            module.in_channels,
            module.out_channels,
            kernel=_pair(module.kernel_size),
            stride=_pair(module.stride),
            padding=_pair(module.padding),
            block=block,
        )
    return None


def _pair(sides: tuple[int, ...]) -> tuple[int, int]:
    height, width = sides
    return height, width


def get_family(kind: str) -> tuple[type[Family], type[FamilyOptions]]:
    """The family's class and its options' class; OptionError lists the known kinds."""
    module = load_plugin(__name__, kind)
    return module.family, module.options
