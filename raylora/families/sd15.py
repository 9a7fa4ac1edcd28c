"""Stable Diffusion 1.x: a UNet with cross-attention, CLIP-L text, a four-channel VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from raylora.base.options import known_as
from raylora.base.site import Place, Site
from raylora.base.unit import Unit
from raylora.components.clip import (
    ClipTextOptions,
    MaxTokens,
    check_clip_skip,
    clip_place,
    clip_sites,
    clip_units,
    empty_clip,
    load_clip,
    read_clip,
)
from raylora.components.pipelines import UnetRenderer, base_scheduler
from raylora.components.texts import Conditions, Prompts
from raylora.components.unet import (
    check_stable_diffusion,
    check_widths,
    empty_unet,
    load_unet,
    scheduler_process,
    sd_block,
    unet_config,
    unet_sites,
    unet_units,
)
from raylora.components.vae import Decoder, VaeFacts, load_vae, vae_facts
from raylora.diffusion.clip_text import Chunks, caption_tokens, chunk_captions
from raylora.families import Family, FamilyOptions, Models, Renderer
from raylora.weights.base import Base

_FLOAT32_BYTES = 4


class Sd15Options(ClipTextOptions, FamilyOptions):
    """Stable Diffusion 1.x and models of its layout."""

    layout: ClassVar[str] = "sd15"
    native_resolution: ClassVar[int] = 512
    bucket_step: ClassVar[int] = 64

    kind: Literal["sd15"] = "sd15"
    clip_skip: int = Field(1, ge=1, json_schema_extra=known_as(sd_scripts="--clip_skip"))
    """Which layer of CLIP the text is taken from, counted from the last, which is 1. Many anime
    bases were trained with 2. Previews use the same."""


class Sd15(Family):
    """A UNet that reads CLIP's hidden states, a VAE, a scheduler; 2.x and XL build on it.

    Attributes:
        kind: the word of the family, in sentences and in the cache.
        projected: the text encoders that have a projection of their pooled state.
        normed: CLIP's final norm follows the layer that is read.
    """

    kind: ClassVar[str] = "sd15"
    projected: ClassVar[tuple[str, ...]] = ()
    normed: ClassVar[bool] = True
    component = "unet"
    text_components: tuple[str, ...] = ("text_encoder",)
    blocks = (12, 1, 12)

    def __init__(self, base: Base, options: Any) -> None:
        self.base = base
        self._options = options
        self._unet_config = unet_config(base, kind=self.kind)
        self._vae_facts = vae_facts(base, kind=self.kind)
        self._text_configs = [base.config(component) for component in self.text_components]
        widths = sum(config["hidden_size"] for config in self._text_configs)
        self._check()
        check_widths(base, self._unet_config, channels=self._vae_facts.channels, text=widths)
        self.process = scheduler_process(base, kind=self.kind)
        self.pixels_per_latent = self._vae_facts.pixels_per_latent
        self.latent_channels = self._vae_facts.channels
        # The UNet halves its latents once between each two of its blocks.
        halvings = len(self._unet_config["block_out_channels"]) - 1
        self.size_step = self.pixels_per_latent * 2**halvings
        self.max_tokens = options.max_tokens
        self.longer_tokens = tuple(n for n in get_args(MaxTokens) if n > options.max_tokens)
        self.text_bytes = (options.max_tokens + 2) * widths * _FLOAT32_BYTES
        v = self.process.prediction == "v_prediction"
        self.metadata = {
            **self._version(v=v),
            "ss_sd_model_name": base.name,
            "modelspec.prediction_type": "v" if v else "epsilon",
        }

    def _check(self) -> None:
        """WeightsError where the base is of another family, or has not the layers asked for."""
        check_stable_diffusion(self.base, self._unet_config, linear=False)
        check_clip_skip(self.base, self._options.clip_skip)

    def _version(self, *, v: bool) -> dict[str, str]:
        return {
            "ss_base_model_version": "sd_v1",
            "ss_v2": "False",
            "ss_clip_skip": str(self._options.clip_skip),
            "modelspec.architecture": "stable-diffusion-v1",
        }

    def load_denoiser(self, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The UNet."""
        return self._unet(dtype, device)

    def _unet(self, dtype: torch.dtype, device: torch.device, *, plain: bool = False) -> nn.Module:
        unet = load_unet(self.base, dtype=dtype, device=device, plain=plain)
        self.alter("unet", unet)
        return unet

    def encoder_facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Names the VAE and the text encoders by their bytes."""
        latents_facts = {
            "family": self.kind,
            "vae": self.base.content_hash("vae"),
            "scaling": self._vae_facts.scaling,
            "pick": "mode",
            "dtype": "float32",
        }
        text_facts = {
            "family": self.kind,
            "text_encoders": [self.base.content_hash(one) for one in self.text_components],
            "tokenizers": [self.base.tokenizer_hash(one) for one in self._tokenizer_names],
            "max_tokens": self._options.max_tokens,
            "clip_skip": self._options.clip_skip,
            "weighted_captions": self._options.weighted_captions,
            "dtype": "float32",
        }
        return latents_facts, text_facts | self.merged_texts()

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """By the base's own tokenizer; with `weighted_captions`, of the text without the syntax."""
        weighted = self._options.weighted_captions
        found = caption_tokens(self._tokenizers[0], captions, weighted=weighted)
        return [len(tokens) for tokens in found]

    @property
    def vae_facts(self) -> VaeFacts:
        """What the VAE's config says."""
        return self._vae_facts

    def skeletons(self) -> tuple[nn.Module, Models]:
        """All from their configs."""
        return empty_unet(self.base), {
            component: empty_clip(self.base, component, projected=component in self.projected)
            for component in self.text_components
        }

    def load_text_encoder(
        self, component: str, *, dtype: torch.dtype, device: torch.device
    ) -> nn.Module:
        """A CLIP, with a projection where the family reads its pooled state."""
        projected = component in self.projected
        clip = load_clip(self.base, component, projected=projected, dtype=dtype, device=device)
        self.alter(component, clip)
        return clip

    def tokens(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        """`ids` and `weights`, (B, N, 77) each; `ids_2` and `weights_2` of a second encoder."""
        words: dict[str, NDArray[Any]] = {}
        for component, chunks in zip(self.text_components, self._chunks(captions), strict=True):
            words[f"ids{_number(component)}"] = chunks.ids_BNT.numpy()
            words[f"weights{_number(component)}"] = chunks.weights_BNT.numpy()
        return words

    def _chunks(self, captions: Sequence[str]) -> list[Chunks]:
        return [
            chunk_captions(
                tokenizer,
                captions,
                max_tokens=self._options.max_tokens,
                weighted=self._options.weighted_captions,
            )
            for tokenizer in self._tokenizers
        ]

    def read_text(
        self, component: str, encoder: nn.Module, tokens: Mapping[str, Tensor]
    ) -> Conditions:
        """`text` (B, T, D) and `pooled` (B, D) in the encoder's dtype."""
        number, skip = _number(component), self._options.clip_skip
        chunks = Chunks(tokens[f"ids{number}"], tokens[f"weights{number}"])
        read = read_clip(encoder, chunks, skip=skip, normed=self.normed)
        return {"text": read.hidden_BTD, "pooled": read.pooled_BD}

    def join_texts(
        self, said: Mapping[str, Mapping[str, Tensor]], tokens: Mapping[str, Tensor]
    ) -> Conditions:
        """`text` (B, T, D)."""
        return {"text": said["text_encoder"]["text"]}

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """Every layer of the UNet."""
        return unet_sites(denoiser, sd_block)

    def text_sites(self, text_encoders: Models) -> list[Site]:
        """Every layer of the text encoders."""
        return [
            site
            for component in self.text_components
            for site in clip_sites(component, text_encoders[component])
        ]

    def units(self, denoiser: nn.Module) -> list[Unit]:
        """Residual and transformer blocks."""
        return unet_units(denoiser)

    def text_units(self, text_encoders: Models) -> dict[str, list[Unit]]:
        """CLIP's layers."""
        return {one: clip_units(one, encoder) for one, encoder in text_encoders.items()}

    def place(self, name: str) -> Place:
        """sd-scripts keeps diffusers' own paths."""
        component, _, path = name.partition(".")
        return Place("lora_unet", path) if component == "unet" else clip_place(name, "lora_te")

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Tensor],
    ) -> Tensor:
        """noisy (B, 4, H, W), timesteps (B,), conditions["text"] (B, T, D) -> (B, 4, H, W)."""
        prediction: Tensor = denoiser(noisy, timesteps, conditions["text"], return_dict=False)[0]
        return prediction

    def _renderer(
        self,
        denoiser: nn.Module,
        prompts: Prompts,
        decoder: Decoder,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Renderer:
        """It is told nothing of sizes: XL's pipeline asks for uncut pictures of the size drawn."""
        pipeline = self._pipeline(denoiser, dict.fromkeys(self.text_components), None)
        pipeline.vae_scale_factor = self.pixels_per_latent
        return UnetRenderer(pipeline, prompts, decoder, dtype=dtype, device=device)

    def load_pipeline(
        self,
        denoiser: nn.Module | None = None,
        text_encoders: Models | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Any:
        """StableDiffusionPipeline, or XL's."""
        encoders = text_encoders or self.load_text_encoders(dtype=dtype, device=device)
        vae = load_vae(self.base, dtype=dtype, device=device)
        return self._pipeline(denoiser or self._unet(dtype, device, plain=True), encoders, vae)

    def _pipeline(
        self, unet: nn.Module, encoders: Mapping[str, nn.Module | None], vae: nn.Module | None
    ) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=encoders["text_encoder"],
            tokenizer=self._tokenizers[0],
            unet=unet,
            scheduler=base_scheduler(self.base),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    @property
    def _tokenizer_names(self) -> list[str]:
        return [f"tokenizer{_number(component)}" for component in self.text_components]

    @cached_property
    def _tokenizers(self) -> list[Any]:
        return [self.base.tokenizer(name) for name in self._tokenizer_names]


def _number(component: str) -> str:
    """What diffusers puts behind the names of a second encoder's parts: "_2"."""
    return component.removeprefix("text_encoder")


family = Sd15
options = Sd15Options
