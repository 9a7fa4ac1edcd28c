"""DoRA: LoRA on the direction of each row of the weight, and the row's length beside it.

W' = m (W + ΔW) / ‖W + ΔW‖ with ΔW = scale · up · down; m begins at ‖W‖, so that a fresh adapter
changes nothing. Neither W' nor ΔW is formed: the change is (m / ‖W + ΔW‖ - 1) W x and a LoRA with
its rows rescaled, and the norm's square is W's own and products of W with the halves.

Source: Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raylora.base.options import known_as
from raylora.base.site import Site
from raylora.networks import Arrays, Call, Draw, Network, Parameters, Weight, lora


class DoraOptions(lora.LowRankOptions):
    """Low-rank adapters that learn the length of each weight row apart from its direction."""

    kind: Literal["dora"] = "dora"
    axis: Literal["output", "input"] = Field(
        "output",
        json_schema_extra=known_as(
            formula="output: m and the norm are of each row of W (an output's weights); input: of "
            "each column",
            source="Liu et al. 2024, arXiv 2402.09353",
            sd_scripts="none (LyCORIS: wd_on_output true and false)",
        ),
    )
    """Whose lengths are learned apart. output is what peft, diffusers and LyCORIS' reader take;
    ComfyUI 0.3 divides by the frozen row's length there, so that a file is a little stronger or
    weaker in it. input is exact in ComfyUI, and diffusers and LyCORIS' reader do not take it."""
    norm_gradient: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="whether the gradient also goes through ‖W + ΔW‖",
            source="false: section 4.3 of arXiv 2402.09353; true: LyCORIS",
        ),
    )
    """Let the gradient pass through the length that is divided by, as LyCORIS does. Off, as in the
    paper and in peft, it is a constant, which takes less memory and learns as well."""


def initial(options: DoraOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    """As LoRA's, and `dora_scale`, (O, 1) or (1, I): the lengths of the frozen weight."""
    frozen_OIK = weight().reshape(site.outputs, site.inputs, -1)
    axes = (1, 2) if options.axis == "output" else (0, 2)
    lengths = np.sqrt(np.square(frozen_OIK).sum(axis=axes))
    found = lora.initial(options, site, draw, lambda: frozen_OIK.reshape(site.outputs, -1))
    found["dora_scale"] = lengths[:, None] if options.axis == "output" else lengths[None]
    if options.norm_gradient:
        found["norm_gradient"] = np.ones(1)
    return found


def constants(options: DoraOptions, site: Site) -> frozenset[str]:
    """LoRA's; `norm_gradient` says by being there that the norm has a gradient."""
    return lora.constants(options, site) | ({"norm_gradient"} if options.norm_gradient else set())


def forward(parameters: Parameters, call: Call) -> Tensor:
    """The adapted output; what a gate leaves out is of LoRA's half of the change alone."""
    down, up = lora.halves(parameters)
    frozen = call.layer.weight
    assert isinstance(frozen, Tensor)
    with nullcontext() if "norm_gradient" in parameters else torch.no_grad():
        lengths = _lengths(frozen, down, call.scale * up, parameters["dora_scale"])
    ratio = (parameters["dora_scale"] / lengths).flatten()
    if _on_output(parameters["dora_scale"]):
        of_frozen = unbiased(call) * along(ratio - 1, call.x, call.site)
        x, up = call.x, call.scale * ratio[:, None] * up
    else:
        of_frozen = through(call.x * along(ratio - 1, call.x, call.site), frozen, call.site)
        x, up = call.x * along(ratio, call.x, call.site), call.scale * up
    hidden = lora.into_rank(x, down, call.site)
    if call.gate is not None:
        hidden = lora.gated(hidden, parameters["up"].shape[1], call)
    change = of_frozen + lora.out_of_rank(hidden, up, call.site)
    return call.base_output + call.strength * change


def _on_output(lengths: Tensor) -> bool:
    return lengths.shape[1] == 1


def _lengths(frozen: Tensor, down: Tensor, up_OR: Tensor, like: Tensor) -> Tensor:
    """‖W + up down‖ of each row or column, in the shape of `like` and in 32 bits at least."""
    wide = torch.promote_types(torch.promote_types(up_OR.dtype, frozen.dtype), torch.float32)
    frozen_OIK = frozen.to(wide).reshape(*frozen.shape[:2], -1)
    down_RIK = down.to(wide).reshape(*down.shape[:2], -1)
    up_OR = up_OR.to(wide)
    if _on_output(like):
        frozen_OK, down_RK = frozen_OIK.flatten(1), down_RIK.flatten(1)
        mixed = ((frozen_OK @ down_RK.T) * up_OR).sum(1)
        own = ((up_OR @ (down_RK @ down_RK.T)) * up_OR).sum(1)
        squares = frozen_OK.square().sum(1) + 2 * mixed + own
    else:
        seen_RIK = torch.einsum("or,oik->rik", up_OR, frozen_OIK)
        own_RIK = torch.einsum("rs,sik->rik", up_OR.T @ up_OR, down_RIK)
        added = (2 * seen_RIK + own_RIK) * down_RIK
        squares = frozen_OIK.square().sum((0, 2)) + added.sum((0, 2))
    # A row that is zero in the base has no direction: it stays zero until LoRA gives it one.
    least = torch.finfo(wide).eps ** 2
    return squares.clamp(min=least).sqrt().view(like.shape)


def unbiased(call: Call) -> Tensor:
    """What the frozen layer gave, without its bias: what its weight alone makes of x."""
    bias: Any = call.layer.bias
    if bias is None:
        return call.base_output
    return call.base_output - along(bias, call.base_output, call.site)


def along(vector: Tensor, activations: Tensor, site: Site) -> Tensor:
    """A number for each channel, so that it multiplies activations; in their dtype."""
    vector = vector.to(activations.dtype)
    return vector[:, None, None] if site.kind == "conv" else vector


def through(x: Tensor, weight: Tensor, site: Site) -> Tensor:
    """What a weight in the layer's place gives, without a bias; (O, I) also for 1x1 kernels."""
    weight = weight.to(x.dtype)
    if site.kind == "linear":
        return F.linear(x, weight)
    kernel = weight.reshape(len(weight), -1, *site.kernel)
    return F.conv2d(x, kernel, stride=site.stride, padding=site.padding)


def export(parameters: Parameters, site: Site, scale: float) -> dict[str, Tensor]:
    """LoRA's tensors and `dora_scale`, (O, 1) or (O, 1, 1, 1); for the other axis (1, I, …)."""
    lengths = parameters["dora_scale"]
    if site.kind == "conv":
        lengths = lengths[..., None, None]
    return lora.export(parameters, site, scale) | {"dora_scale": lengths}


def merged(parameters: Parameters, site: Site, scale: float, held: Parameters) -> dict[str, Tensor]:
    """The weight plus LoRA's change, at the learned lengths."""
    found = lora.merged(parameters, site, scale, held)
    whole_OIK = found["weight"].reshape(site.outputs, site.inputs, -1)
    lengths = parameters["dora_scale"].double()
    axes = (1, 2) if _on_output(lengths) else (0, 2)
    # Where the norm is a constant to forward's gradient, it is one here.
    direction = whole_OIK if "norm_gradient" in parameters else whole_OIK.detach()
    norms = torch.linalg.vector_norm(direction, dim=axes).view(lengths.shape)
    ratio = lengths / norms.clamp(min=torch.finfo(torch.float64).eps)
    return {**found, "weight": (whole_OIK * ratio[..., None]).view(found["weight"].shape)}


network = Network(
    options=DoraOptions,
    initial=initial,
    forward=forward,
    export=export,
    merged=merged,
    constants=constants,
    fast=("up",),
    drops=frozenset({"dropout", "rank_dropout"}),
)
