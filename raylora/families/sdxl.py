"""Stable Diffusion XL: a larger UNet, two text encoders, and conditions on size and crop.

The UNet is told each picture's size as it was found, where it was really cut, and the size that it
is trained at; so that pictures drawn later may be asked to look uncut and of high resolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from raylora.base.errors import WeightsError
from raylora.base.options import known_as
from raylora.base.site import Place, Site
from raylora.components.clip import ClipTextOptions, clip_place
from raylora.components.pipelines import base_scheduler
from raylora.components.texts import Conditions
from raylora.components.unet import sgm_block, sgm_path, unet_sites
from raylora.components.vae import decoding_dtype
from raylora.families import FamilyOptions
from raylora.families.sd15 import Sd15
from raylora.weights.base import Base

_LAYER_BEFORE_THE_LAST = 2
_SIZES = 6
_FLOAT32_BYTES = 4


class SdxlOptions(ClipTextOptions, FamilyOptions):
    """Stable Diffusion XL and models of its layout, that predict epsilon or v."""

    layout: ClassVar[str] = "sdxl"
    native_resolution: ClassVar[int] = 1024
    bucket_step: ClassVar[int] = 64

    kind: Literal["sdxl"] = "sdxl"
    clip_skip: int = Field(
        2,
        json_schema_extra=known_as(
            sd_scripts="--clip_skip (of no effect for SDXL there)", guides="clip skip 2"
        ),
    )
    """Always 2: the layer before the last of both text encoders, which SDXL was trained on. There
    is no other choice; the word is here since guides name it."""

    @field_validator("clip_skip")
    @classmethod
    def _is_as_trained(cls, value: int) -> int:
        if value != _LAYER_BEFORE_THE_LAST:
            raise ValueError(
                f"family.clip_skip is {value}, and SDXL reads the layer before the last of both "
                "text encoders, which is 2, whatever a program's setting says. Leave it out."
            )
        return value


class Sdxl(Sd15):
    """UNet, CLIP-L, OpenCLIP-bigG, VAE and scheduler."""

    kind: ClassVar[str] = "sdxl"
    projected: ClassVar[tuple[str, ...]] = ("text_encoder_2",)
    normed: ClassVar[bool] = False
    text_components = ("text_encoder", "text_encoder_2")
    wants_geometry = True
    usual_guidance = 5.0  # as StableDiffusionXLPipeline has it
    usual_sampler = "euler"  # of the base's own scheduler config
    blocks = (9, 3, 9)
    block_ends = True

    def __init__(self, base: Base, options: Any) -> None:
        super().__init__(base, options)
        self.text_bytes += self._pooled * _FLOAT32_BYTES

    @property
    def _pooled(self) -> int:
        return int(self._text_configs[1]["projection_dim"])

    def _check(self) -> None:
        unet = self._unet_config
        if unet.get("addition_embed_type") != "text_time":
            raise WeightsError(
                f"{self.base.name}: its unet is not told sizes and crops (addition_embed_type is "
                "not text_time): this is not Stable Diffusion XL. Choose the family that fits the "
                "weights."
            )
        told = int(unet["projection_class_embeddings_input_dim"])
        ours = _SIZES * int(unet["addition_time_embed_dim"]) + self._pooled
        if told != ours:
            raise WeightsError(
                f"{self.base.name}: its unet is told {told} numbers beside the text, and six sizes "
                f"with the pooled text make {ours}: this is XL's refiner or another model, which "
                "raylora does not train. Use XL's base model."
            )

    def _version(self, *, v: bool) -> dict[str, str]:
        return {
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_v2": "False",
            "modelspec.architecture": "stable-diffusion-xl-v1-base",
        }

    def join_texts(
        self, said: Mapping[str, Mapping[str, Tensor]], tokens: Mapping[str, Tensor]
    ) -> Conditions:
        """`text` (B, T, D) of both encoders side by side, `pooled` (B, D) of the second."""
        first, second = (said[one] for one in self.text_components)
        text = torch.cat([first["text"], second["text"]], dim=-1)
        return {"text": text, "pooled": second["pooled"]}

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """Every layer of the UNet."""
        return unet_sites(denoiser, lambda path: sgm_block(self._sgm(path)))

    def place(self, name: str) -> Place:
        """The UNet by its makers' names; the text encoders are te1 and te2."""
        component, _, path = name.partition(".")
        if component == "unet":
            return Place("lora_unet", self._sgm(path))
        return clip_place(name, f"lora_te{self.text_components.index(component) + 1}")

    def _sgm(self, path: str) -> str:
        config = self._unet_config
        attended = ["CrossAttn" in block for block in config["up_block_types"]]
        return sgm_path(path, deep=int(config["layers_per_block"]), attended=attended)

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Tensor],
    ) -> Tensor:
        """noisy (B, 4, H, W), timesteps (B,) -> (B, 4, H, W).

        Args:
            conditions: `text` (B, T, D), `pooled` (B, D) and `geometry` (B, 6), which stays in
                float32: bf16 keeps 8 bits of mantissa, so that sizes above 256 collide there.
        """
        assert conditions["geometry"].dtype == torch.float32
        told = {"text_embeds": conditions["pooled"], "time_ids": conditions["geometry"]}
        prediction: Tensor = denoiser(
            noisy, timesteps, conditions["text"], added_cond_kwargs=told, return_dict=False
        )[0]
        return prediction

    def decoding_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32 where the VAE says that float16 is too narrow for it."""
        return decoding_dtype(self.base, dtype)

    def _pipeline(
        self, unet: nn.Module, encoders: Mapping[str, nn.Module | None], vae: nn.Module | None
    ) -> Any:
        from diffusers import StableDiffusionXLPipeline

        first, second = self._tokenizers
        return StableDiffusionXLPipeline(
            vae=vae,
            tokenizer=first,
            tokenizer_2=second,
            unet=unet,
            scheduler=base_scheduler(self.base),
            add_watermarker=False,
            **encoders,
        )


family = Sdxl
options = SdxlOptions
