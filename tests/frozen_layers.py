"""Frozen layers of every kind in float64, and adapters on them, for tests of single networks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from raylora.adapt import kinds
from raylora.base.site import Site
from raylora.components.sites import site_of
from raylora.networks import Call, NetworkOptions, get_network

LAYERS = ("tokens", "pixels", "kernel")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def layer_at(name: str, *, inputs: int = 12, outputs: int = 8) -> nn.Module:
    """A linear layer, a 1x1 convolution without bias, one that halves, or a norm."""
    double = {"dtype": torch.float64}
    layer = {
        "tokens": lambda: nn.Linear(inputs, outputs, **double),
        "pixels": lambda: nn.Conv2d(inputs, outputs, 1, bias=False, **double),
        "kernel": lambda: nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, **double),
        "layer_norm": lambda: nn.LayerNorm(inputs, **double),
        "group_norm": lambda: nn.GroupNorm(2, inputs, **double),
        "rms_norm": lambda: nn.RMSNorm(inputs, eps=1e-6, **double),
    }[name]()
    with torch.no_grad():
        for seed, weight in enumerate(layer.parameters()):
            weight.copy_(normal(seed, *weight.shape))
    return layer.requires_grad_(False)


class Trained:
    """An adapter on one layer as if it had been trained: every number moved.

    Attributes:
        first: its fresh parameters.
        held: its moved ones.
    """

    def __init__(self, name: str, options: NetworkOptions, *, size: float = 0.3, **sides: int):
        self.layer = layer_at(name, **sides)
        site = site_of(f"toy.{name}", self.layer)
        assert site is not None
        self.site: Site = site
        self.options, self.network = options, get_network(options.kind)
        self.scale = options.scale_at(site)
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        frozen = weight.double().numpy()
        arrays = self.network.initial(options, site, _draw(site.name), lambda: frozen)
        frozen_words = self.network.constants(options, site)
        self.first = {word: torch.from_numpy(np.array(array)) for word, array in arrays.items()}
        self.held = {
            word: tensor if word in frozen_words else tensor + size * normal(seed, *tensor.shape)
            for seed, (word, tensor) in enumerate(self.first.items())
        }
        sides_of = (4, 6) if site.kind == "conv" or name == "group_norm" else ()
        shape = (2, site.inputs, *sides_of) if sides_of else (2, 5, site.inputs)
        self.x = normal(30, *shape)

    def call(self, **more: object) -> Call:
        call = Call(self.x, self.layer(self.x), self.scale, 1.0, self.site, self.layer)
        return call._replace(**more)

    def output(self, held: dict[str, Tensor] | None = None, **more: object) -> Tensor:
        return self.network.forward(self.held if held is None else held, self.call(**more))

    def of_weight(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the layer gives with another weight, and another bias."""
        own: Tensor = self.layer.weight  # type: ignore[assignment]
        swapped = {"weight": weight.view(own.shape)}
        return functional_call(
            self.layer, swapped if bias is None else {**swapped, "bias": bias}, self.x
        )

    @property
    def frozen(self) -> Tensor:
        """(O, I) or (O, I, kh, kw)."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight

    @property
    def file(self) -> dict[str, Tensor]:
        """What a LoRA file has of it."""
        return self.network.export(self.held, self.site, self.scale)

    def merged(self) -> dict[str, Tensor]:
        frozen = dict(self.layer.named_parameters())
        return self.network.merged(self.held, self.site, self.scale, frozen)

    def read(self) -> dict[str, Tensor]:
        """The layer's weights as the file changes them, by the formulas that read files."""
        return kinds.merged(self.file, dict(self.layer.named_parameters()))


def _draw(name: str):  # type: ignore[no-untyped-def]
    generator = np.random.default_rng(len(name))

    def draw(shape: tuple[int, ...]) -> NDArray[np.float64]:
        return generator.uniform(-1.0, 1.0, shape)

    return draw
