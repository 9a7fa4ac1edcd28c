"""A base of true size with random weights, drawn on a device and kept in host memory.

Nothing is downloaded. What is measured on it is time and memory; what it learns means nothing.
Weights have the size that a trained network's have, so that numbers stay finite through all of its
layers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from raylora.weights.true_configs import true_configs
from raylora.weights.weightless import WeightlessBase


class RandomWeights(Mapping[str, Tensor]):
    """Each weight is drawn when it is first read, and kept on the host as a file would have it."""

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self._shapes = dict(shapes)
        self._device = device
        self._drawn: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._drawn:
            self._drawn[name] = self._draw(name).to("cpu", torch.bfloat16)
        return self._drawn[name]

    def _draw(self, name: str) -> Tensor:
        shape = self._shapes[name]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        if len(shape) < 2:  # norms scale by about 1, and biases shift by about 0
            middle = 1.0 if name.endswith("weight") else 0.0
            drawn = torch.randn(shape, generator=generator, device=self._device)
            return middle + 0.02 * drawn
        drawn = torch.randn(shape, generator=generator, device=self._device, dtype=torch.bfloat16)
        return drawn.mul_(0.5 / math.sqrt(math.prod(shape[1:])))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class RandomBase(WeightlessBase):
    """A usual base by its short name, whose weights are random."""

    def __init__(self, word: str, device: torch.device) -> None:
        super().__init__(word, true_configs(word))
        self._device = device
        self._weights: dict[str, RandomWeights] = {}
        self.shapes: dict[str, dict[str, torch.Size]] = {}

    def weights(self, component: str) -> Mapping[str, Tensor]:  # type: ignore[override]
        """Those of a component whose shapes were given."""
        if component not in self._weights:
            self._weights[component] = RandomWeights(self.shapes[component], self._device)
        return self._weights[component]

    def fingerprint(self, component: str) -> str:
        """Of what is drawn."""
        return f"random {self.name} {component}"

    def content_hash(self, component: str) -> str:
        """Likewise."""
        return self.fingerprint(component)

    def tokenizer_hash(self, component: str) -> str:
        """There is none, and nobody reads captions."""
        return "none"
