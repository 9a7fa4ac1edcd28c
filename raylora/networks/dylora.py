"""DyLoRA: a LoRA that is good at every smaller rank too, since its ranks are trained in order.

Of each layer a sample trains one slice of ranks, with those before it as they are and without those
behind it. Cutting the file down to its first ranks then costs little.

Source: Valipour et al. 2022, arXiv 2210.07558; the strength of a slice is sd-scripts'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raylora.base.options import known_as
from raylora.base.site import Site
from raylora.networks import Arrays, Call, Draw, Network, NetworkOptions, Parameters, Weight, lora


class DyloraOptions(NetworkOptions):
    """Low-rank adapters whose first ranks are adapters by themselves."""

    kind: Literal["dylora"] = "dylora"
    unit: int = Field(
        1,
        ge=1,
        json_schema_extra=known_as(
            formula="b is a multiple of unit below rank, drawn for each sample, step and layer; "
            "ranks before b + unit are used, of which b to b + unit are trained, and the output is "
            "times alpha / rank sqrt(rank / (b + unit))",
            source="Valipour et al. 2022, arXiv 2210.07558",
            sd_scripts="--network_args unit (b is one for a whole batch there)",
        ),
    )
    """How many ranks are trained together; the file may be cut to any multiple of it. It must
    divide the rank. Larger is faster and gives fewer choices: 4 to 8 for ranks of 32 and more."""

    def problems(self, network: Network) -> Iterator[str]:
        """Those of every network, and a unit that leaves a rest."""
        yield from super().problems(network)
        if self.rank % self.unit:
            units = [str(n) for n in range(1, self.rank + 1) if self.rank % n == 0]
            yield (
                f"network.unit is {self.unit}, which does not divide network.rank {self.rank}. "
                f"Choose one of {', '.join(units)}."
            )
        if self.unit == self.rank and self.rank > 1:
            yield (
                f"network.unit is network.rank, {self.rank}: all ranks would be trained together, "
                "which is LoRA. Choose network.kind lora, or a smaller unit."
            )
        if self.initial_ranks:
            yield (
                "network.initial_ranks takes the file's ranks, and network.unit has to divide "
                "them. Set network.rank to the file's instead."
            )


def fits(options: DyloraOptions, site: Site) -> str | None:
    """Not where a layer's own rank leaves a rest."""
    rank = options.rank_at(site)
    if rank % options.unit:
        return f"its rank is {rank}, which network.unit {options.unit} does not divide"
    return lora.network.fits(options, site)


def initial(options: DyloraOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    """As LoRA's."""
    return lora.plain(options.rank_at(site), site, draw)


def forward(parameters: Parameters, call: Call) -> Tensor:
    """All ranks as LoRA applies them, or each row's slice and those before it."""
    return lora.forward(parameters, call) if call.part is None else pure(parameters, call)


def pure(parameters: Parameters, call: Call) -> Tensor:
    """The same in plain operations."""
    if call.part is None:
        return lora.pure(parameters, call)
    x, site = call.x, call.site
    down, up = parameters["down"], parameters["up"]
    rank, axis = len(down), 1 if site.kind == "conv" else x.dim() - 1
    first_B, unit = call.part(rank, x)
    first = first_B.view(-1, *[1] * (x.dim() - 1))
    place = torch.arange(rank, device=x.device).view(
        [rank if d == axis else 1 for d in range(x.dim())]
    )
    trained, before = (place >= first) & (place < first + unit), place < first
    # Twice the same numbers, once for gradients: those before the slice pass them on to x alone.
    hidden = trained * lora.into_rank(x, down, site)
    passed = before * lora.into_rank(x, down.detach(), site)
    if call.gate is not None:
        hidden, passed = call.gate(hidden), call.gate(passed)
    change = lora.out_of_rank(hidden, up, site) + lora.out_of_rank(passed, up.detach(), site)
    grown = (rank / (first + unit).to(up.dtype)).sqrt().to(x.dtype)
    return call.base_output + call.scale * call.strength * grown * change


def unit(options: DyloraOptions) -> int:
    """How many ranks a sample trains at a time."""
    return options.unit


network = Network(
    options=DyloraOptions,
    initial=initial,
    forward=forward,
    export=lora.export,
    merged=lora.merged,
    pure=pure,
    halves=lora.halves,
    fits=fits,
    fast=("up",),
    drops=lora.DROPS,
    unit=unit,
)
