"""The contract of a network: what one file in this folder gives.

A network is a pure function of its parameters, its input and the frozen layer's output, so that a
pack of trials or a grid of strengths can batch it later. A file `networks/<kind>.py` defines:

    class <Kind>Options(NetworkOptions): kind: Literal["<kind>"] = "<kind>" ...
    network: Network = Network(options=..., initial=..., forward=..., export=...)

The file's name is the word in the YAML (`network.kind`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from raylora.base.lookup import load_plugin
from raylora.base.options import Options
from raylora.base.site import Site

Parameters = Mapping[str, Tensor]
Draw = Callable[[tuple[int, ...]], NDArray[np.float64]]
"""Uniform numbers in [-1, 1) of a shape, from the site's own stream."""


class NetworkOptions(Options):
    """What every network has."""

    kind: str = "lora"
    """Which network: the name of a file in raylora/networks."""
    layers: Literal["attention", "attention_mlp"] = "attention_mlp"
    """attention: q, k, v and out only. attention_mlp: every linear and 1x1 conv of the transformer
    blocks, as sd-scripts trains by default."""
    rank: int = Field(16, ge=1, le=4096)
    """Width of the adapter; 4-32 is usual, file size grows with it."""
    alpha: float | None = Field(None, gt=0)
    """Strength is alpha / rank; null means alpha = rank (strength 1)."""

    @property
    def scale(self) -> float:
        """alpha / rank, by which the adapter's output is multiplied."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class Network:
    """One kind of adapter.

    Attributes:
        options: the class of its section in the job.
        initial: (options, site, draw) -> named parameters, fresh; the adapter then changes nothing.
        forward: (parameters, x, base_output, scale) -> the adapted layer's output; pure.
        export: (parameters, site, options) -> tensors as the LoRA file names them.
    """

    options: type[NetworkOptions]
    initial: Callable[[Any, Site, Draw], dict[str, NDArray[np.float64]]]
    forward: Callable[[Parameters, Tensor, Tensor, float], Tensor]
    export: Callable[[Parameters, Site, Any], dict[str, Tensor]]


def get_network(kind: str) -> Network:
    """The network of that name; OptionError lists the known ones."""
    network = load_plugin(__name__, kind).network
    assert isinstance(network, Network)
    return network
