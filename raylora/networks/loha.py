"""LoHa: the change of a weight is the Hadamard product of two low-rank ones.

ΔW = scale · (w1_a w1_b) ∘ (w2_a w2_b), which reaches rank R² with the numbers of two rank-R pairs.
In Tucker's form each of the two has a core with the kernel instead.

Source: Hyeon-Woo, Ye-Bin & Oh 2021, arXiv 2108.06098 (FedPara); names and first weights are those
of the LyCORIS project.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from raylora.base.options import known_as
from raylora.base.site import Site
from raylora.networks import Arrays, Call, Draw, Network, NetworkOptions, Parameters, Weight
from raylora.networks.dora import through


class LohaOptions(NetworkOptions):
    """Two low-rank pairs multiplied number by number."""

    kind: Literal["loha"] = "loha"
    tucker: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="each factor is sum over i, j of t[i, j] w_a[i] w_b[j]; t is R x R with the "
            "layer's kernel",
            source="Hyeon-Woo et al. 2021, arXiv 2108.06098, proposition 3",
            sd_scripts="none (LyCORIS: use_tucker)",
            guides="Tucker, CP decomposition",
        ),
    )
    """On convolutions larger than 1x1, a core with the kernel between two matrices; fewer numbers
    at equal rank. Other layers are as without it."""

    def form_at(self, site: Site) -> tuple[object, ...]:
        """Tucker's form is of larger kernels alone."""
        return *super().form_at(site), self.tucker and site.kernel != (1, 1)


def initial(options: LohaOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    """One of the four zero, so that nothing is changed; the others of the spread LyCORIS has.

    Those are 1 for `hada_w1_b` and `hada_w2_b`, 0.1 for `hada_w1_a` and the cores.
    """
    rank, core = options.rank_at(site), options.tucker and site.kernel != (1, 1)
    inputs = site.inputs if core else site.inputs * math.prod(site.kernel)
    outer = (rank, site.outputs) if core else (site.outputs, rank)
    found = {
        "hada_w1_a": _spread(draw, 0.1, *outer),
        "hada_w1_b": _spread(draw, 1.0, rank, inputs),
        "hada_w2_a": np.zeros(outer),
        "hada_w2_b": _spread(draw, 1.0, rank, inputs),
    }
    if core:
        found["hada_t1"] = _spread(draw, 0.1, rank, rank, *site.kernel)
        found["hada_t2"] = _spread(draw, 0.1, rank, rank, *site.kernel)
    return found


def _spread(draw: Draw, deviation: float, *shape: int) -> NDArray[np.float64]:
    """Uniform numbers of that standard deviation."""
    drawn: NDArray[np.float64] = draw(shape) * (deviation * np.sqrt(3.0))
    return drawn


class _Hadamard(torch.autograd.Function):
    """(a1 b1) ∘ (a2 b2) that remembers the four, and not two matrices of the layer's size."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        return (a1 @ b1) * (a2 @ b2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        a1, b1, a2, b2 = ctx.saved_tensors
        first, second = grad * (a2 @ b2), grad * (a1 @ b1)
        return first @ b1.T, a1.T @ first, second @ b2.T, a2.T @ second


def forward(parameters: Parameters, call: Call) -> Tensor:
    """The adapted output; a gate leaves out whole rows."""
    if "hada_t1" in parameters:
        return pure(parameters, call)
    factors = [parameters[f"hada_{word}"] for word in ("w1_a", "w1_b", "w2_a", "w2_b")]
    return _added(_Hadamard.apply(*factors), call)  # type: ignore[no-untyped-call]


def pure(parameters: Parameters, call: Call) -> Tensor:
    """The same in plain operations."""
    return _added(product(parameters), call)


def product(parameters: Parameters) -> Tensor:
    """ΔW / scale, (O, I · kh · kw) or, in Tucker's form, (O, I, kh, kw)."""
    return _factor(parameters, 1) * _factor(parameters, 2)


def _factor(parameters: Parameters, number: int) -> Tensor:
    outer, inner = parameters[f"hada_w{number}_a"], parameters[f"hada_w{number}_b"]
    if "hada_t1" not in parameters:
        return outer @ inner
    return torch.einsum("rshw,ro,si->oihw", parameters[f"hada_t{number}"], outer, inner)


def _added(change: Tensor, call: Call) -> Tensor:
    output = through(call.x, change, call.site)
    if call.gate is not None:
        output = call.gate(output)
    return call.base_output + call.scale * call.strength * output


def export(parameters: Parameters, site: Site, scale: float) -> dict[str, Tensor]:
    """The factors under LyCORIS' names, which are ours, and alpha."""
    rank = len(parameters["hada_w1_b"])
    return {**parameters, "alpha": torch.tensor(scale * rank, dtype=torch.float32)}


def merged(parameters: Parameters, site: Site, scale: float, held: Parameters) -> dict[str, Tensor]:
    """The weight plus scale times the product."""
    change = product({word: tensor.double() for word, tensor in parameters.items()})
    return {**held, "weight": held["weight"] + scale * change.view(held["weight"].shape)}


network = Network(
    options=LohaOptions,
    initial=initial,
    forward=forward,
    export=export,
    merged=merged,
    pure=pure,
    drops=frozenset({"module_dropout"}),
)
