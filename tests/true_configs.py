"""Bases of true size without weights, of the configs that raylora ships for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from raylora.weights.base import Base
from raylora.weights.true_configs import true_configs

SD15 = true_configs("sd15")
SD21 = true_configs("sd21")
SDXL = true_configs("sdxl")
SD15_UNET, SD2_UNET, SDXL_UNET = (configs["unet"] for configs in (SD15, SD21, SDXL))
CLIP_L, CLIP_H = SD15["text_encoder"], SD21["text_encoder"]
CLIP_BIG_G = SDXL["text_encoder_2"]
VAE = SD15["vae"]


class Configured(Base):
    """A base that has configs and nothing else."""

    license = None

    def __init__(self, configs: Mapping[str, Mapping[str, Any]], name: str = "true-size") -> None:
        self.name = name
        self._configs = configs

    def has(self, component: str) -> bool:
        return component in self._configs

    def config(self, component: str) -> dict[str, Any]:
        return dict(self._configs[component])

    def content_hash(self, component: str) -> str:
        return f"hash of {component}"

    def tokenizer_hash(self, component: str) -> str:
        return f"hash of {component}"

    def fingerprint(self, component: str) -> str:
        return f"fingerprint of {component}"

    def weights(self, component: str) -> dict[str, Tensor]:
        return _absent(component)

    def tokenizer(self, component: str) -> Any:
        return _absent(component)


def _absent(component: str) -> NoReturn:
    raise AssertionError(f"{component} was asked for more than its config")
