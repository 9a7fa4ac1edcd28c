"""The contract of a network: what one file in this folder gives.

A network is a pure function of its parameters and of what its layer is asked (`Call`), so that a
pack of adapters can batch it. Dropout is handed in (`Gate`), so that its masks belong to the sample
and not to whoever computes. A file `networks/<kind>.py` defines:

    class <Kind>Options(NetworkOptions): kind: Literal["<kind>"] = "<kind>" ...
    network: Network = Network(options=..., initial=..., forward=..., export=..., merged=...)

The file's name is the word in the YAML (`network.kind`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from raylora.base.layer_options import LayerOptions, encoder_problems
from raylora.base.lookup import load_plugin
from raylora.base.options import known_as
from raylora.base.site import Site

Parameters = Mapping[str, Tensor]
"""One site's tensors by word, those that are not trained among them."""
Arrays = dict[str, NDArray[np.float64]]
"""The same, before they are given to a device."""
Draw = Callable[[tuple[int, ...]], NDArray[np.float64]]
"""Uniform numbers in [-1, 1) of a shape, from the site's own stream."""
Weight = Callable[[], NDArray[np.float64]]
"""Gives the frozen layer's weight as it is in the base; a copy of it, so ask once."""
Gate = Callable[[Tensor], Tensor]
"""Takes the rank-sized hidden, (B, ..., R) of a linear layer or (B, R, H, W) of a convolution, to
the same with what is dropped at zero; differentiable, and the same whenever it is asked again.
Where only whole modules are dropped, it takes any tensor whose first axis is the samples'."""
Part = Callable[[int, Tensor], tuple[Tensor, int]]
"""Which of that many ranks each row of a tensor trains in this layer: the first, (B,) int64 on its
device, and how many; see `Network.unit`."""


class Call(NamedTuple):
    """What a layer is asked for: one forward of a batch.

    Attributes:
        x: (..., I) for a linear layer, (B, I, H, W) for a convolution, any for a norm.
        base_output: what the frozen layer gave, its bias included.
        scale: alpha / rank; in a pack a tensor without dimensions.
        strength: how much of the change is wanted: 1 is all of it, as trained. In a pack a tensor
            without dimensions.
        layer: the frozen layer, for networks that need its `weight` or `bias`.
        gate: dropout; None drops nothing.
        part: which ranks each row trains; None where all of them are used, as always but in the
            training of networks with a `unit`.
        rounded: the parameters in x's dtype, where all of an adapter's were rounded at once. Then
            the gradient of one that is trained may be added to its `grad` in place of handing it
            back, which spares a GPU two operations each.
        overwrite: base_output is nobody else's, so that it may be written over.
    """

    x: Tensor
    base_output: Tensor
    scale: float | Tensor
    strength: float | Tensor
    site: Site
    layer: nn.Module
    gate: Gate | None = None
    part: Part | None = None
    rounded: Parameters | None = None
    overwrite: bool = False


class NetworkOptions(LayerOptions):
    """What every network has."""

    kind: str = "lora"
    """Which network: the name of a file in raylora/networks."""
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

    @model_validator(mode="after")
    def _refuse_what_the_network_cannot(self) -> Self:
        for problem in self.problems(get_network(self.kind)):
            raise ValueError(problem)
        return self

    def problems(self, network: Network) -> Iterator[str]:
        """What this kind of network cannot do of what was asked, a sentence each.

        A network that has more to refuse adds to these.
        """
        yield from encoder_problems(self, trains_text=self.trains_text)
        if self.max_norm is not None and not network.low_rank:
            yield (
                f"network.max_norm caps the product of two halves, which {self.kind} does not "
                "have. Choose network.kind lora, locon or dylora, or leave it out."
            )
        for word, share in (
            ("dropout", self.dropout),
            ("rank_dropout", self.rank_dropout),
            ("module_dropout", self.module_dropout),
        ):
            if share and word not in network.drops:
                can = [f"network.{other}" for other in sorted(network.drops)]
                instead = f"Use {' or '.join(can)}, or leave" if can else "Leave"
                yield f"network.{word}: {self.kind} has none. {instead} it out."

    def usual_rank(self, site: Site) -> int:
        """Width at a layer that has none of its own."""
        return self.rank

    def usual_alpha(self, site: Site) -> float | None:
        """Alpha at a layer that has none of its own; None is the layer's rank."""
        return self.alpha

    def divided(self, alpha: float, rank: int) -> float:
        """The strength that an alpha means at a rank."""
        return alpha / rank

    def rank_at(self, site: Site) -> int:
        """Width at one layer."""
        own = self.own_rank(site)
        return self.usual_rank(site) if own is None else own

    def alpha_at(self, site: Site) -> float | None:
        """Alpha at one layer; None where it is the layer's rank."""
        own = self.own_alpha(site)
        return self.usual_alpha(site) if own is None else own

    def scale_at(self, site: Site) -> float:
        """alpha / rank at one layer, by which the adapter's output is multiplied."""
        alpha = self.alpha_at(site)
        return 1.0 if alpha is None else self.divided(alpha, self.rank_at(site))

    def form_at(self, site: Site) -> tuple[object, ...]:
        """What ranks, strengths and factors make of one layer's adapter; equal where they make the
        same."""
        return self.rank_at(site), self.scale_at(site)

    @property
    def trains_text(self) -> bool:
        """Whether the text encoder carries an adapter."""
        return self.train != "denoiser"

    @property
    def trains_denoiser(self) -> bool:
        """Whether the denoiser carries an adapter."""
        return self.train != "text_encoder"


def _nothing(options: NetworkOptions, site: Site) -> frozenset[str]:
    return frozenset()


def _not_on_norms(options: NetworkOptions, site: Site) -> str | None:
    if site.kind == "norm":
        return f"{options.kind} is for linear layers and convolutions, and this is a norm"
    return None


def _all_ranks(options: NetworkOptions) -> int:
    return 0


def _as_forward(parameters: Parameters, call: Call) -> Tensor:
    raise AssertionError("replaced by the network's forward")


@dataclass(frozen=True)
class Network:
    """One kind of adapter.

    Attributes:
        options: the class of its section in the job.
        initial: (options, site, draw, weight) -> named parameters, fresh; the adapter then changes
            nothing. Linear layers and 1x1 convolutions have flat ones, (R, I) and (O, R), larger
            convolutions (R, I, kh, kw), norms vectors.
        forward: (parameters, call) -> the adapted layer's output at `call.strength`; pure.
        export: (parameters, site, scale) -> tensors as LyCORIS' and kohya's files name them.
        merged: (parameters, site, scale, held) -> the layer's weights with the adapter in them at
            strength 1; held and the answer are "weight" and, where the layer has one, "bias",
            float64 in the layer's own shape.
        pure: the same numbers as forward in plain operations that `torch.func.vmap` can batch;
            the forward itself where none is given. `x` and `base_output` keep a first axis of one.
        constants: (options, site) -> words of parameters that are not trained: they have no
            gradient, and their place is `Adapter.constants`.
        halves: parameters -> (down, up) with ΔW = scale · up · down, (R, I, …) and (O, R), of
            whatever rank it takes; None where the change is not of low rank.
        fits: (options, site) -> why it cannot sit on a layer; None where it can.
        fast: the words that LoRA+ moves faster, those that start at zero.
        drops: the kinds of dropout that its forward gives its gate to.
        unit: options -> how many ranks a sample trains at a time, for forwards that ask
            `call.part`; 0 where it trains them all.
        start_changes: whether a fresh adapter does change the base.
    """

    options: type[NetworkOptions]
    initial: Callable[[Any, Site, Draw, Weight], Arrays]
    forward: Callable[[Parameters, Call], Tensor]
    export: Callable[[Parameters, Site, float], dict[str, Tensor]]
    merged: Callable[[Parameters, Site, float, Parameters], dict[str, Tensor]]
    pure: Callable[[Parameters, Call], Tensor] = _as_forward
    constants: Callable[[Any, Site], frozenset[str]] = _nothing
    halves: Callable[[Parameters], tuple[Tensor, Tensor]] | None = None
    fits: Callable[[Any, Site], str | None] = _not_on_norms
    fast: tuple[str, ...] = ()
    drops: frozenset[str] = frozenset()
    unit: Callable[[Any], int] = _all_ranks
    start_changes: bool = False

    def __post_init__(self) -> None:
        """Where nothing else is given, the forward is the pure one."""
        if self.pure is _as_forward:
            object.__setattr__(self, "pure", self.forward)

    @property
    def low_rank(self) -> bool:
        """Whether its change of weight is a product of two halves."""
        return self.halves is not None


def get_network(kind: str) -> Network:
    """The network of that name; OptionError lists the known ones."""
    network = load_plugin(__name__, kind).network
    assert isinstance(network, Network)
    return network
