"""LoCon: LoRA on the convolutions of the residual blocks and the samplers too, with their own rank.

Source: the LyCORIS project's LoCon; sd-scripts' `conv_dim`. A convolution's `down` has the kernel,
the stride and the padding of the frozen one, its `up` is 1x1. In Tucker's form `down` is 1x1 too,
and a `mid` of rank x rank has the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raylora.base.options import known_as
from raylora.base.site import Site
from raylora.networks import Arrays, Call, Draw, Network, Parameters, Weight, lora


class LoconOptions(lora.LowRankOptions):
    """LoRA, and the same on the layers of the residual blocks and the samplers."""

    convolutions: ClassVar[bool] = True

    kind: Literal["locon"] = "locon"
    conv_rank: int | None = Field(
        None,
        ge=1,
        le=4096,
        json_schema_extra=known_as(
            formula="W * x + conv_alpha / conv_rank * up(down(x)), down with the layer's kernel",
            source="Yeh et al. 2023, arXiv 2309.14859",
            sd_scripts="--network_args conv_dim",
            guides="conv",
        ),
    )
    """Width on convolutions larger than 1x1; null is `rank`. The other layers of the residual
    blocks have `rank`."""
    conv_alpha: float | None = Field(
        None,
        gt=0,
        json_schema_extra=known_as(
            sd_scripts="--network_args conv_alpha (1 where not given)", guides="conv_alpha"
        ),
    )
    """Strength on these is conv_alpha / conv_rank; null means conv_alpha = conv_rank."""
    tucker: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="up(mid(down(x))); down and up 1x1, mid R x R with the layer's kernel",
            source="Yeh et al. 2023, arXiv 2309.14859",
            sd_scripts="none (LyCORIS: use_tucker)",
            guides="Tucker, CP decomposition",
        ),
    )
    """Split convolutions larger than 1x1 in three instead of two: at equal rank up to five times
    smaller on 3x3 layers. Such files need a reader that knows `lora_mid`."""

    def problems(self, network: Network) -> Iterator[str]:
        """Those of LoRA, and what Tucker's form cannot be."""
        yield from super().problems(network)
        if self.tucker and self.start == "pissa":
            yield (
                "network.tucker: three factors have no principal start. Leave out network.start or "
                "network.tucker."
            )

    @property
    def gives_alpha(self) -> bool:
        """Whether some layer's strength is not simply 1."""
        return super().gives_alpha or self.conv_alpha is not None

    def usual_rank(self, site: Site) -> int:
        """`conv_rank` on a convolution larger than 1x1."""
        return self.rank if site.kernel == (1, 1) else self.conv_rank or self.rank

    def usual_alpha(self, site: Site) -> float | None:
        """`conv_alpha` on a convolution larger than 1x1."""
        return self.alpha if site.kernel == (1, 1) else self.conv_alpha

    def form_at(self, site: Site) -> tuple[object, ...]:
        """Tucker's form is of larger kernels alone."""
        return *super().form_at(site), self.tucker and site.kernel != (1, 1)


def initial(options: LoconOptions, site: Site, draw: Draw, weight: Weight) -> Arrays:
    """As LoRA's; in Tucker's form `mid` (R, R, kh, kw) is uniform like `down`, which is (R, I)."""
    if not options.tucker or site.kernel == (1, 1):
        return lora.initial(options, site, draw, weight)
    rank = options.rank_at(site)
    return {
        "down": lora.uniform(draw, rank, site.inputs),
        "mid": lora.uniform(draw, rank, rank, *site.kernel),
        "up": np.zeros((site.outputs, rank)),
    }


def halves(parameters: Parameters) -> tuple[Tensor, Tensor]:
    """As LoRA's; Tucker's `mid` and `down` make one `down` with the kernel."""
    if "mid" not in parameters:
        return lora.halves(parameters)
    down = torch.einsum("rshw,si->rihw", parameters["mid"], parameters["down"])
    return down, parameters["up"]


def forward(parameters: Parameters, call: Call) -> Tensor:
    """As LoRA's, or through `mid`."""
    if "mid" not in parameters:
        return lora.forward(parameters, call)
    return pure(parameters, call)


def pure(parameters: Parameters, call: Call) -> Tensor:
    """The same in plain operations."""
    if "mid" not in parameters:
        return lora.pure(parameters, call)
    down, mid = (parameters[word].to(call.x.dtype) for word in ("down", "mid"))
    hidden = F.conv2d(call.x, down[:, :, None, None])
    hidden = F.conv2d(hidden, mid, stride=call.site.stride, padding=call.site.padding)
    if call.gate is not None:
        hidden = call.gate(hidden)
    change = lora.out_of_rank(hidden, parameters["up"], call.site)
    return call.base_output + call.scale * call.strength * change


def export(parameters: Parameters, site: Site, scale: float) -> dict[str, Tensor]:
    """As LoRA's, with `lora_mid.weight` in Tucker's form."""
    if "mid" not in parameters:
        return lora.export(parameters, site, scale)
    plain = {word: tensor for word, tensor in parameters.items() if word != "mid"}
    return lora.export(plain, site, scale) | {"lora_mid.weight": parameters["mid"]}


def merged(parameters: Parameters, site: Site, scale: float, held: Parameters) -> dict[str, Tensor]:
    """The weight plus scale * up down, both in float64."""
    exact = {word: tensor.double() for word, tensor in parameters.items()}
    down, up = halves(exact)
    return lora.merged({"down": down, "up": up}, site, scale, held)


network = Network(
    options=LoconOptions,
    initial=initial,
    forward=forward,
    export=export,
    merged=merged,
    pure=pure,
    constants=lora.constants,
    halves=halves,
    fast=("up",),
    drops=lora.DROPS,
)
