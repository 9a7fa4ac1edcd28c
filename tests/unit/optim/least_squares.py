"""A least-squares problem that every optimizer can be let loose on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raylora.optim.kinds import KINDS
from raylora.optim.optimizers import OptimizerOptions, TensorGroup, make_optimizer, sets_rate

SHAPES = [(8, 640), (640, 8), (5, 1)]
"""Above and below 4096 numbers, from which on bitsandbytes takes 8 bits."""
LARGE = [(32, 4096), (4096, 32), (5, 1)]
"""The same, and above the 100,000 from which on it pages, on a GPU."""


def each(names: Iterable[str]) -> list[Any]:
    """Names of optimizers as parameters; those whose package takes seconds to import are slow."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if _takes_long(name) else name for name in names
    ]


def _takes_long(name: str) -> bool:
    return name.startswith("adafactor") or (name in KINDS and KINDS[name].extra == "bnb")


class Problem:
    """Parameters in two groups, that want to be `target`."""

    def __init__(
        self, options: OptimizerOptions, values: list[Tensor] | None = None, device: str = "cpu"
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        shapes = SHAPES if device == "cpu" else LARGE
        start = [torch.randn(*shape, generator=draw).to(device) for shape in shapes]
        self.target = [torch.randn(*shape, generator=draw).to(device) for shape in shapes]
        self.leaves = [nn.Parameter(value.clone()) for value in values or start]
        self.options = options
        rate = options.rate
        groups: list[TensorGroup] = [
            {"params": self.leaves[:1], "rate": rate, "name": "textencoder"},
            {"params": self.leaves[1:], "rate": rate, "name": "unet"},
        ]
        self.optimizer = make_optimizer(options, groups)

    def values(self) -> list[Tensor]:
        return [leaf.detach().clone() for leaf in self.leaves]

    def loss(self) -> float:
        pairs = zip(self.leaves, self.target, strict=True)
        return sum(float((leaf - target).square().sum()) for leaf, target in pairs) / 2

    def move(self, steps: range, factor: Callable[[int], float]) -> None:
        for step in steps:
            for leaf, target in zip(self.leaves, self.target, strict=True):
                leaf.grad = (leaf - target).detach()
            if sets_rate(self.options):
                for group in self.optimizer.param_groups:
                    group["lr"] = abs(self.options.rate) * factor(step)
            self.optimizer.step()
