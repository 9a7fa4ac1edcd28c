"""Bases of true size without weights, of the configs that raylora ships for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raylora.weights.true_configs import true_configs
from raylora.weights.weightless import WeightlessBase

SD15 = true_configs("sd15")
SD21 = true_configs("sd21")
SDXL = true_configs("sdxl")
SD15_UNET, SD2_UNET, SDXL_UNET = (configs["unet"] for configs in (SD15, SD21, SDXL))
CLIP_L, CLIP_H = SD15["text_encoder"], SD21["text_encoder"]
CLIP_BIG_G = SDXL["text_encoder_2"]
VAE = SD15["vae"]


class Configured(WeightlessBase):
    """A base that has configs, and names that tell of what they were asked for."""

    def __init__(self, configs: Mapping[str, Mapping[str, Any]], name: str = "true-size") -> None:
        super().__init__(name, configs)

    def content_hash(self, component: str) -> str:
        return f"hash of {component}"

    def tokenizer_hash(self, component: str) -> str:
        return f"hash of {component}"

    def fingerprint(self, component: str) -> str:
        return f"fingerprint of {component}"
