"""The contract of a network: what one file in this folder gives.

A network is a pure function of its parameters, its input and the frozen layer's output, so that a
pack of trials or a grid of strengths can batch it later. Dropout is handed in (`Gate`), so that its
masks belong to the sample and not to whoever computes. A file `networks/<kind>.py` defines:

    class <Kind>Options(NetworkOptions): kind: Literal["<kind>"] = "<kind>" ...
    network: Network = Network(options=..., initial=..., forward=..., export=...)

The file's name is the word in the YAML (`network.kind`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from raylora.base.lookup import load_plugin
from raylora.base.options import Options, known_as
from raylora.base.site import Site

Parameters = Mapping[str, Tensor]
Draw = Callable[[tuple[int, ...]], NDArray[np.float64]]
"""Uniform numbers in [-1, 1) of a shape, from the site's own stream."""
Gate = Callable[[Tensor], Tensor]
"""Takes the rank-sized hidden, (B, ..., R) of a linear layer or (B, R, H, W) of a convolution, to
the same with what is dropped at zero; differentiable, and the same whenever it is asked again."""


class NetworkOptions(Options):
    """What every network has."""

    kind: str = "lora"
    """Which network: the name of a file in raylora/networks."""
    layers: Literal["attention", "attention_mlp"] = "attention_mlp"
    """attention: q, k, v and out only. attention_mlp: every linear and 1x1 conv of the transformer
    blocks, as sd-scripts trains by default."""
    train: Literal["denoiser", "text_encoder", "both"] = Field(
        "denoiser",
        json_schema_extra=known_as(
            sd_scripts="--network_train_unet_only, --network_train_text_encoder_only; both is "
            "what it does with neither",
            guides="train text encoder",
        ),
    )
    """Which models carry the adapter. Where the text encoder does, captions are encoded as they are
    shown, and its own rate is `optimizer.text_encoder_rate`."""
    rank: int = Field(
        16,
        ge=1,
        le=4096,
        json_schema_extra=known_as(
            formula="W x + alpha / rank * up(down(x)); down is rank wide",
            source="Hu et al. 2021, arXiv 2106.09685",
            sd_scripts="--network_dim (4 where not given)",
            guides="dim, linear",
        ),
    )
    """Width of the adapter; 4-32 is usual, file size grows with it."""
    alpha: float | None = Field(
        None,
        gt=0,
        json_schema_extra=known_as(
            formula="alpha / rank multiplies the adapter's output",
            sd_scripts="--network_alpha (1 where not given)",
            guides="linear_alpha",
        ),
    )
    """Strength is alpha / rank; null means alpha = rank (strength 1)."""
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        json_schema_extra=known_as(
            formula="each number of down(x) is 0 with probability p, else divided by 1 - p",
            source="Srivastava et al. 2014",
            sd_scripts="--network_dropout",
        ),
    )
    """Share of the adapter's inner numbers that are left out, drawn anew for each sample, step and
    layer."""
    rank_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        json_schema_extra=known_as(
            formula="each rank is 0 for the whole sample with probability p, else divided by 1 - p",
            sd_scripts="--network_args rank_dropout",
        ),
    )
    """Share of ranks that a sample is trained without."""
    module_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        json_schema_extra=known_as(
            formula="the layer's adapter is 0 for the whole sample with probability p",
            sd_scripts="--network_args module_dropout (there for a whole batch at once)",
        ),
    )
    """Share of layers whose adapter a sample is trained without."""
    max_norm: float | None = Field(
        None,
        gt=0,
        json_schema_extra=known_as(
            formula="n = max(norm of alpha / rank * up down, M / 2); up and down times "
            "sqrt(M / n) where n > M",
            sd_scripts="--scale_weight_norms (there after each micro-batch)",
            guides="scale weight norms",
        ),
    )
    """Most that a layer's change of weight may measure (Frobenius norm) after a global step; what
    is larger is scaled down. Null: no limit."""
    initial: str | None = Field(
        None,
        json_schema_extra=known_as(
            sd_scripts="--network_weights (its alpha is overridden there)",
            guides="continue from a LoRA",
        ),
    )
    """A LoRA file to start from, local or s3://; its alpha is honoured. Layers that it leaves out
    start fresh."""
    initial_ranks: bool = Field(False, json_schema_extra=known_as(sd_scripts="--dim_from_weights"))
    """Take ranks, alphas and the choice of layers from `initial`, instead of from this job."""

    convolutions: ClassVar[bool] = False
    """Whether it also sits on the convolutions outside of the transformer blocks."""

    def rank_at(self, site: Site) -> int:
        """Width at one layer."""
        return self.rank

    def scale_at(self, site: Site) -> float:
        """alpha / rank at one layer, by which the adapter's output is multiplied."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def trains_text(self) -> bool:
        """Whether the text encoder carries an adapter."""
        return self.train != "denoiser"

    @property
    def trains_denoiser(self) -> bool:
        """Whether the denoiser carries an adapter."""
        return self.train != "text_encoder"


@dataclass(frozen=True)
class Network:
    """One kind of adapter.

    Attributes:
        options: the class of its section in the job.
        initial: (options, site, draw) -> named parameters, fresh; the adapter then changes nothing.
        forward: (parameters, x, base_output, scale, site, gate) -> the adapted layer's output;
            pure. gate is None where nothing is dropped.
        export: (parameters, site, scale) -> tensors as the LoRA file names them.
    """

    options: type[NetworkOptions]
    initial: Callable[[Any, Site, Draw], dict[str, NDArray[np.float64]]]
    forward: Callable[[Parameters, Tensor, Tensor, float, Site, Gate | None], Tensor]
    export: Callable[[Parameters, Site, float], dict[str, Tensor]]


def get_network(kind: str) -> Network:
    """The network of that name; OptionError lists the known ones."""
    network = load_plugin(__name__, kind).network
    assert isinstance(network, Network)
    return network
