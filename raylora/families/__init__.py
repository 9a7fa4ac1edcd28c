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
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from raylora.base.lookup import load_plugin
from raylora.base.options import Options, known_as
from raylora.base.site import Place, Site
from raylora.base.unit import Unit
from raylora.components.cache_encoder import CacheEncoder
from raylora.components.lent import Keeps, Lender, Load
from raylora.components.texts import Conditions, Prompts
from raylora.components.vae import Decoder, Tiling, VaeFacts, load_vae
from raylora.diffusion.process import AnyProcess
from raylora.diffusion.samplers import DrawNoise, Sampler
from raylora.diffusion.timesteps import Draw, Shift
from raylora.weights.base import Base

_FLOAT32_BYTES = 4
Models = Mapping[str, nn.Module]
"""Component -> model."""


class BaseLora(Options):
    """A LoRA that becomes part of the base."""

    file: str
    """The LoRA file, local or s3://."""
    strength: float = 1.0
    """How much of it; 1 is as it was trained."""


def _kind_is_given(schema: dict[str, Any]) -> None:
    """A job has to name its family, whatever a class of options has as its own word."""
    if "kind" in schema["properties"]:
        schema["properties"]["kind"].pop("default", None)
        schema["required"] = ["kind", *schema.get("required", ())]


class FamilyOptions(Options):
    """Which base model.

    Attributes:
        layout: the family whose checkpoints and files its bases have: its own word, or another's
            where it is a variant of that.
        native_resolution: side in pixels of the square pictures that the family's bases were
            trained on; what a job gets that names no resolution.
        bucket_step: sides of buckets are multiples of this many pixels where a job names no other.
    """

    model_config = ConfigDict(json_schema_extra=_kind_is_given)

    layout: ClassVar[str]
    native_resolution: ClassVar[int]
    bucket_step: ClassVar[int]

    kind: str
    """The model family: the name of a file in raylora/families."""
    weights: str
    """The base: a folder in diffusers layout or one .safetensors checkpoint, local or s3://; a
    model hub's id (owner/name); or the short name of a usual base, as docs/families.md lists."""
    vae: str | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--vae", guides="external VAE")
    )
    """Another VAE than the base's: a folder in diffusers layout or a .safetensors file, local or
    s3://, or a model hub's id."""
    parts: dict[str, str] = Field(
        {},
        json_schema_extra=known_as(
            sd_scripts="--clip_l, --clip_g, --t5xxl, --ae", guides="separate text encoders"
        ),
    )
    """Other components than the base's, each by its name (text_encoder, text_encoder_2, ...;
    tokenizer, ...; scheduler): a folder or a .safetensors file, local or s3://, or a model hub's
    id. For checkpoints that hold the denoiser alone. A single checkpoint has no configs and no
    tokenizers: they are the usual base's, whose tokenizers come from its hub. `config` names a
    folder in diffusers layout that has both, for models of other sizes and machines without a
    connection."""
    loras: tuple[BaseLora, ...] = Field(
        (),
        json_schema_extra=known_as(
            formula="W + strength * alpha / rank * up down, for each file",
            sd_scripts="--base_weights, --base_weights_multiplier",
        ),
    )
    """LoRA files that are merged into the base before anything is encoded, trained or drawn."""
    training_adapter: str | None = Field(
        None,
        json_schema_extra=known_as(
            formula="training and measuring: base + file + adapter; previews and files: adapter "
            "alone",
            guides="assistant LoRA, training adapter, de-distillation LoRA",
        ),
    )
    """A LoRA file that is on while training and off in previews and for people, for distilled bases
    such as FLUX.1-schnell: with it the base learns like one that was not distilled, and without it
    what was learned draws in a few steps. Of the denoiser alone; it stays as it is."""

    @model_validator(mode="after")
    def _names_one_vae(self) -> Self:
        if self.vae is not None and "vae" in self.parts:
            raise ValueError("family.vae and family.parts.vae: give one of them.")
        return self


class Family(ABC):
    """One base model, its parts loaded when they are asked for.

    Attributes:
        base: where configs, weights and tokenizers come from.
        component: the denoiser's name in exported files, "unet" or "transformer".
        text_components: the text encoders' names, in the order of the options that list them.
        process: how latents are noised and what is predicted.
        pixels_per_latent: how many pixels one latent cell spans.
        size_step: image sides must be multiples of this many pixels.
        metadata: facts for the file's header (ss_base_model_version, modelspec names, ss_clip_skip
            where it means something ...).
        max_tokens: tokens of a caption that are read; what is longer is cut off. None where the
            family has no such limit to choose.
        longer_tokens: the larger values that `family.max_tokens` may be set to, rising.
        token_advice: what else lets more tokens be read, where `longer_tokens` is empty; "" is
            nothing.
        text_bytes: size of one caption in the cache, for estimates.
        wants_geometry: batches bring `geometry`, (B, 6) float32: the picture's height and width as
            it was found, its true crop's top and left once it was resized, the bucket's height and
            width; all in pixels.
        encoder_dropout: share of samples that are trained without each text encoder, in the order
            of `text_components`; batches bring `dropped`, (B, E) float32 of 0 and 1, where any
            is above 0. Empty: the family has no such option.
        usual_guidance, usual_sampler, usual_steps: of previews, where the job names none.
        usual_embedded_guidance: of previews, likewise, for bases that are told a guidance as a
            number; None is not told any.
        usual_draw, usual_shift: of timesteps, where the job names none.
        blocks: how many blocks the family counts on the way down, in the middle and on the way up
            (for transformers: double, 0, single; or all, 0, 0); what block-wise lists have.
        block_ends: lists of ranks count what lies before the first and behind the last block too.
        recorded: micro-batches are recorded as CUDA graphs where `memory.cuda_graphs` is auto.
        alter: what is done to each model once it is loaded, by component: LoRAs merged into it.
        altered: component -> what names that; part of fingerprints and of the cache's names.
    """

    base: Base
    component: str
    text_components: tuple[str, ...]
    process: AnyProcess
    pixels_per_latent: int
    latent_channels: int
    size_step: int
    metadata: dict[str, str]
    max_tokens: int | None
    longer_tokens: tuple[int, ...]
    token_advice: str = ""
    text_bytes: int
    wants_geometry: bool = False
    encoder_dropout: tuple[float, ...] = ()
    usual_guidance: float = 7.5
    usual_sampler: Sampler = "ddim"
    usual_steps: int = 30
    usual_embedded_guidance: float | None = None
    usual_draw: Draw = "uniform"
    usual_shift: Shift | None = None
    blocks: tuple[int, int, int]
    block_ends: bool = False
    recorded: ClassVar[bool] = True
    alter: Callable[[str, nn.Module], None] = staticmethod(lambda component, model: None)
    altered: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def __init__(self, base: Base, options: Any) -> None:
        """Read the configs, not the weights. WeightsError when the base is not of this family."""

    @abstractmethod
    def load_denoiser(self, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The frozen denoiser, ready to be adapted."""

    def fingerprint(self) -> str:
        """Names the denoiser by its weights, without reading all of them, and by what is merged
        into them; a run keeps to one."""
        merged = (f"{part} {name}" for part, name in sorted(self.altered.items()))
        return " ".join([self.base.fingerprint(self.component), *merged])

    @abstractmethod
    def encoder_facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(latents_facts, text_facts) without loading a model."""

    @abstractmethod
    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, uncut and without the first and the last; loads no weights.

        More than `max_tokens` are not read. Syntax that is no part of the text is not counted.
        """

    def latents_bytes(self, bucket: tuple[int, int]) -> int:
        """Size of one picture in the cache, for estimates, in float32 as the encoder gives it;
        bucket is (width, height) in pixels."""
        width, height = (side // self.pixels_per_latent for side in bucket)
        return self.latent_channels * width * height * _FLOAT32_BYTES

    def merged_texts(self) -> dict[str, dict[str, str]]:
        """What the facts of captions say of text encoders that files are merged into."""
        merged = {one: self.altered[one] for one in self.text_components if one in self.altered}
        return {"merged": merged} if merged else {}

    @property
    @abstractmethod
    def vae_facts(self) -> VaeFacts:
        """What the VAE's config says."""

    def load_encoder(self, *, device: torch.device, lender: Lender | None = None) -> CacheEncoder:
        """VAE and text encoders for the cache, in float32.

        Args:
            lender: has each of them on the device while it is needed; None keeps all that were
                asked for.
        """
        return CacheEncoder(
            self,
            self._vae(torch.float32),
            self.vae_facts,
            self.encoder_facts(),
            lender or Keeps(device),
        )

    @abstractmethod
    def skeletons(self) -> tuple[nn.Module, Models]:
        """The denoiser and the text encoders on the meta device, to look at their layers."""

    @abstractmethod
    def load_text_encoder(
        self, component: str, *, dtype: torch.dtype, device: torch.device
    ) -> nn.Module:
        """A frozen text encoder, ready to be adapted."""

    def load_text_encoders(self, *, dtype: torch.dtype, device: torch.device) -> Models:
        """All of them by component ("text_encoder", …)."""
        return {
            one: self.load_text_encoder(one, dtype=dtype, device=device)
            for one in self.text_components
        }

    @abstractmethod
    def tokens(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        """What `read_tokens` reads of captions, each with B first; loads no weights."""

    @abstractmethod
    def read_text(
        self, component: str, encoder: nn.Module, tokens: Mapping[str, Tensor]
    ) -> Conditions:
        """What one text encoder says of tokens, each with B first; differentiable."""

    @abstractmethod
    def join_texts(
        self, said: Mapping[str, Mapping[str, Tensor]], tokens: Mapping[str, Tensor]
    ) -> Conditions:
        """The conditions of `predict` from what each text encoder says of the same tokens."""

    def read_tokens(self, text_encoders: Models, tokens: Mapping[str, Tensor]) -> Conditions:
        """The conditions of `predict` from tokens, differentiable; as `load_encoder` gives them."""
        said = {
            one: self.read_text(one, text_encoders[one], tokens) for one in self.text_components
        }
        return self.join_texts(said, tokens)

    @abstractmethod
    def sites(self, denoiser: nn.Module) -> list[Site]:
        """All of the denoiser's layers that an adapter can sit on, in the order of the model.

        Which of them carry one is chosen elsewhere, by what each is (`Site.role`).

        Raises:
            WeightsError: they are not those that the config means.
        """

    @abstractmethod
    def text_sites(self, text_encoders: Models) -> list[Site]:
        """The text encoders' layers, likewise."""

    @abstractmethod
    def place(self, name: str) -> Place:
        """Where kohya's and ComfyUI's files keep the layer of a site's name."""

    @abstractmethod
    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Tensor],
    ) -> Tensor:
        """The denoiser's prediction, (B, C, H, W).

        Args:
            timesteps: (B,) int64; float32 in 0..1000 where the process is a flow.
            conditions: the cached text tensors, with `geometry` and `dropped` where there are any.
        """

    @abstractmethod
    def units(self, denoiser: nn.Module) -> list[Unit]:
        """The denoiser's blocks, in the order in which they run."""

    @abstractmethod
    def text_units(self, text_encoders: Models) -> dict[str, list[Unit]]:
        """Those of each text encoder that is given, by component, likewise."""

    def load_renderer(
        self,
        denoiser: nn.Module,
        text_encoders: Models | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        lender: Lender | None = None,
        tiling: Tiling | None = None,
    ) -> Renderer:
        """Text-to-image with this (possibly adapted) denoiser, for previews.

        Args:
            text_encoders: those that carry an adapter, read anew for each picture; None are the
                base's own, which read a prompt once.
            dtype, device: of activations; weights may be held in another and lie elsewhere.
            lender: has the VAE and the base's text encoders there while they are needed; None keeps
                all that were asked for.
            tiling: of what is decoded; None is whole.
        """
        lender = lender or Keeps(device)
        readers = Keeps(device, text_encoders) if text_encoders else lender
        prompts = Prompts(self, readers, dtype=dtype, changing=bool(text_encoders))
        vae = self._vae(self.decoding_dtype(dtype))
        decoder = Decoder(vae, self.vae_facts, lender, tiling)
        return self._renderer(denoiser, prompts, decoder, dtype, device)

    def _vae(self, dtype: torch.dtype) -> Load:
        return lambda device: load_vae(self.base, dtype=dtype, device=device)

    def decoding_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the VAE decodes in, where the denoiser's activations are of a dtype."""
        return dtype

    @abstractmethod
    def _renderer(
        self,
        denoiser: nn.Module,
        prompts: Prompts,
        decoder: Decoder,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Renderer:
        """diffusers' pipeline around a denoiser alone."""

    @abstractmethod
    def load_pipeline(
        self,
        denoiser: nn.Module | None = None,
        text_encoders: Models | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Any:
        """The family's own pipeline of diffusers, with this base's parts.

        Args:
            denoiser, text_encoders: those that are at hand; None loads the base's own, with what
                is merged into it and nothing of raylora's in their forward passes.
        """


class Renderer(Protocol):
    """Draws one picture with the models it was made of."""

    def read(self, prompts: Sequence[str]) -> None:
        """Read prompts ahead, so that text encoders are needed once for all of them."""

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
        process: AnyProcess | None = None,
        embedded_guidance: float | None = None,
    ) -> NDArray[np.uint8]:
        """A picture (H, W, 3).

        Args:
            latents: (1, C, h, w), standard normal.
            noise: for samplers that draw, which euler_a and dpm_2_a are.
            process: what was trained, where that is not what the base was.
            embedded_guidance: what the base is told, where it is (`usual_embedded_guidance`).
        """


def get_family(kind: str) -> tuple[type[Family], type[FamilyOptions]]:
    """The family's class and its options' class; OptionError lists the known kinds."""
    module = load_plugin(__name__, kind)
    return module.family, module.options
