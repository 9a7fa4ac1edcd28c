"""The contract of a model family: what one file in this folder gives.

A file `families/<kind>.py` defines

    class <Kind>Options(FamilyOptions): kind: Literal["<kind>"] = "<kind>" ...
    family: type[Family]

and its name is the word in the YAML (`family.kind`). Everything that differs between SD 1.5, SDXL
and FLUX is behind `Family`; nothing else asks which family it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylora.base.encoder import Encoder
from raylora.base.lookup import load_plugin
from raylora.base.options import Options
from raylora.base.site import Site
from raylora.diffusion.process import Process


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


class Family(ABC):
    """One base model, its parts loaded when they are asked for.

    Attributes:
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
    """

    component: str
    process: Process
    pixels_per_latent: int
    latent_channels: int
    size_step: int
    metadata: dict[str, str]
    max_tokens: int | None
    longer_tokens: tuple[int, ...]
    text_bytes: int

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
    def sites(self, denoiser: nn.Module, layers: str) -> list[Site]:
        """The layers that `network.layers` means, in the order of the model."""

    @abstractmethod
    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Tensor],
    ) -> Tensor:
        """The denoiser's prediction, (B, C, H, W); conditions are the cached text tensors."""

    @abstractmethod
    def load_renderer(self, denoiser: nn.Module) -> Renderer:
        """Text-to-image with this (possibly adapted) denoiser, for previews."""


class Renderer(Protocol):
    """Draws one picture with the denoiser it was made of."""

    def render(
        self,
        prompt: str,
        *,
        negative: str,
        latents: Tensor,
        steps: int,
        guidance: float,
    ) -> NDArray[np.uint8]:
        """A picture (H, W, 3) from starting noise (1, C, h, w), standard normal."""


def get_family(kind: str) -> tuple[type[Family], type[FamilyOptions]]:
    """The family's class and its options' class; OptionError lists the known kinds."""
    module = load_plugin(__name__, kind)
    return module.family, module.options
