"""OFT: the outputs of a layer are turned in small groups; angles between them stay as they were.

W' = R W, where R is a block-diagonal rotation, each block the Cayley transform of a skew matrix:
R = ((I + Q)(I - Q)⁻¹)ᵀ with Q = blocks - blocksᵀ. Since only outputs are turned, R is applied to
what the frozen layer gave: (R - I)(y - bias) is added, and W' is never formed.

Source: Qiu et al. 2023, arXiv 2306.07280; names, signs and the constraint are those of the LyCORIS
project's diag-oft, which sd-scripts' and ComfyUI's readers share.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from raylora.base.options import known_as
from raylora.base.site import Site
from raylora.networks import Arrays, Call, Draw, Network, NetworkOptions, Parameters, Weight
from raylora.networks.dora import along, unbiased
from raylora.networks.lokr import largest_divisor

_LEAST = 1e-8  # what LyCORIS adds to the norm before it divides by it


class OftOptions(NetworkOptions):
    """Rotations of small groups of outputs."""

    kind: Literal["oft"] = "oft"
    rank: int = Field(
        16,
        ge=2,
        le=4096,
        json_schema_extra=known_as(
            formula="a block's size is the largest divisor of the layer's outputs up to rank and "
            "to their square root",
            source="Qiu et al. 2023, arXiv 2306.07280",
            sd_scripts="--network_dim (there the number of blocks)",
            guides="dim, factor",
        ),
    )
    """Largest number of outputs that are turned among each other; larger learns more and takes more
    space, outputs x size numbers a layer."""
    alpha: float | None = Field(
        None,
        gt=0,
        json_schema_extra=known_as(
            formula="Q times alpha · outputs / norm of Q, where that is below 1",
            source="Qiu et al. 2023, arXiv 2306.07280 (COFT)",
            sd_scripts="--network_alpha (1e-3 where not given)",
            guides="constraint",
        ),
    )
    """How far a layer may be turned at most: 1e-4 to 1e-2 is usual, null is no limit. Files hold
    what is left after it, so that every program reads the same."""

    rescale: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="W' = s (R W); s is a number for each output, 1 at first",
            source="Qiu et al. 2023, arXiv 2306.07280",
            sd_scripts="none (LyCORIS: rescaled)",
        ),
    )
    """Learn a strength for each output beside the rotation. LyCORIS reads such files; ComfyUI
    leaves these strengths out of OFT files."""

    def scale_at(self, site: Site) -> float:
        """The largest norm of Q; 0 is no limit."""
        return limit_at(self, site)

    def form_at(self, site: Site) -> tuple[object, ...]:
        """The groups that are turned, and how far."""
        return block_size(self, site), self.scale_at(site)


def limit_at(options: NetworkOptions, site: Site) -> float:
    """The largest norm that a layer's Q may have: alpha for each output; 0 is no limit."""
    return (options.alpha_at(site) or 0.0) * site.outputs


def block_size(options: OftOptions, site: Site) -> int:
    """How many outputs are turned together; 1 where nothing can be."""
    return largest_divisor(site.outputs, options.rank_at(site))


def fits(options: OftOptions, site: Site) -> str | None:
    """Not on norms, nor on layers whose outputs have no divisor that is small enough."""
    if site.kind == "norm":
        return "oft is for linear layers and convolutions, and this is a norm"
    if block_size(options, site) > 1:
        return None
    return (
        f"its {site.outputs} outputs have no divisor from 2 to network.rank "
        f"{options.rank_at(site)} and to their square root, so oft has no group to turn"
    )


def initial(options: OftOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    """Zero: R is then the identity. `oft_blocks` (blocks, size, size), `rescale` (O,) ones."""
    size = block_size(options, site)
    found: Arrays = {"oft_blocks": np.zeros((site.outputs // size, size, size))}
    if options.rescale:
        found["rescale"] = np.ones(site.outputs)
    return found


def limited(blocks: Tensor, limit: float | Tensor) -> Tensor:
    """Q = blocks - blocksᵀ, made smaller where its norm over the layer is above the limit.

    Args:
        blocks: (..., size, size).
        limit: 0 is none.
    """
    skew = blocks - blocks.mT
    if not isinstance(limit, Tensor) and limit == 0:
        return skew
    ratio = torch.clamp(limit / (torch.linalg.vector_norm(skew) + _LEAST), max=1.0)
    if isinstance(limit, Tensor):
        ratio = torch.where(limit > 0, ratio, torch.ones_like(ratio))
    return skew * ratio


def turn(blocks: Tensor, limit: float | Tensor) -> Tensor:
    """The Cayley transform less the identity, (I + Q)(I - Q)⁻¹ - I, in 32 bits at least.

    As 2 (I - Q)⁻¹ Q, in which a small turn keeps its digits.
    """
    skew = limited(blocks.to(torch.promote_types(blocks.dtype, torch.float32)), limit)
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    turned: Tensor = torch.linalg.solve(identity - skew, 2 * skew)
    return turned


def forward(parameters: Parameters, call: Call) -> Tensor:
    """The adapted output; a gate leaves out whole rows."""
    output = unbiased(call)
    turn_NST = turn(parameters["oft_blocks"], call.scale).to(output.dtype)
    if call.site.kind == "conv":
        grouped = output.flatten(2).unflatten(1, turn_NST.shape[:2])
        turned = (turn_NST.mT @ grouped).view(output.shape)
    else:
        grouped = output.unflatten(-1, turn_NST.shape[:2])
        turned = torch.einsum("nst,...ns->...nt", turn_NST, grouped).flatten(-2)
    return added(turned, output, parameters, call)


def added(turned: Tensor, output: Tensor, parameters: Parameters, call: Call) -> Tensor:
    """What was given, and of the turned outputs' difference what strength, gate and scale say."""
    change = turned
    if "rescale" in parameters:
        rescale = parameters["rescale"]
        change = along(rescale, turned, call.site) * turned
        change = change + along(rescale - 1, output, call.site) * output
    if call.gate is not None:
        change = call.gate(change)
    return call.base_output + call.strength * change


def export(parameters: Parameters, site: Site, scale: float) -> dict[str, Tensor]:
    """`oft_blocks` that are within the limit already, and no limit (alpha 0).

    LyCORIS takes alpha times the outputs for the limit of the norm and ComfyUI alpha alone; so
    written, both read the rotation that was trained.
    """
    # Halved: readers subtract the transpose once more.
    found = {"oft_blocks": limited(parameters["oft_blocks"], scale) / 2}
    if "rescale" in parameters:
        ones = (1, 1, 1) if site.kind == "conv" else (1,)
        found["rescale"] = parameters["rescale"].view(-1, *ones)
    return {**found, "alpha": torch.tensor(0.0)}


def merged(parameters: Parameters, site: Site, scale: float, held: Parameters) -> dict[str, Tensor]:
    """The weight with its rows turned, and rescaled."""
    weight_OK = held["weight"].flatten(1)
    turn_NST = turn(parameters["oft_blocks"].double(), scale)
    grouped = weight_OK.unflatten(0, turn_NST.shape[:2])
    turned = weight_OK + (turn_NST.mT @ grouped).flatten(0, 1)
    return rescaled(turned, parameters, held)


def rescaled(turned_OK: Tensor, parameters: Parameters, held: Parameters) -> dict[str, Tensor]:
    """A turned weight in the layer's shape, each row times its strength."""
    if "rescale" in parameters:
        turned_OK = parameters["rescale"].double()[:, None] * turned_OK
    return {**held, "weight": turned_OK.view(held["weight"].shape)}


network = Network(
    options=OftOptions,
    initial=initial,
    forward=forward,
    export=export,
    merged=merged,
    fits=fits,
    drops=frozenset({"module_dropout"}),
)
