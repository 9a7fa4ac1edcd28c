"""A base that has configs and nothing else: to build its models on the meta device and count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from raylora.base.errors import WeightsError
from raylora.weights.base import Base
from raylora.weights.true_configs import true_configs


class WeightlessBase(Base):
    """Gives the configs that it was made with, and refuses to give weights or tokenizers."""

    license = None

    def __init__(self, name: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self.name = name
        self._configs = configs

    def has(self, component: str) -> bool:
        return component in self._configs

    def config(self, component: str) -> dict[str, Any]:
        return dict(self._configs[component])

    def weights(self, component: str) -> dict[str, Tensor]:
        return self._absent(component)

    def fingerprint(self, component: str) -> str:
        return self._absent(component)

    def content_hash(self, component: str) -> str:
        return self._absent(component)

    def tokenizer(self, component: str) -> Any:
        return self._absent(component)

    def tokenizer_hash(self, component: str) -> str:
        return self._absent(component)

    def _absent(self, component: str) -> NoReturn:
        raise WeightsError(f"{self.name} is here by its configs alone, without {component}.")


def true_size(word: str) -> WeightlessBase:
    """A usual base by its short name, as large as it is and without its weights."""
    return WeightlessBase(word, true_configs(word))
