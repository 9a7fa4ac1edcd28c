"""LoCon: LoRA on the convolutions of the residual blocks and the samplers too, with their own rank.

Source: the LyCORIS project's LoCon; sd-scripts' `conv_dim`. A convolution's `down` has the kernel,
the stride and the padding of the frozen one, its `up` is 1x1.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from raylora.base.options import known_as
from raylora.base.site import Site
from raylora.networks import Network, NetworkOptions
from raylora.networks.lora import export, forward, initial


class LoconOptions(NetworkOptions):
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

    def rank_at(self, site: Site) -> int:
        """`conv_rank` on a convolution larger than 1x1."""
        return self.conv_rank or self.rank if site.kernel != (1, 1) else self.rank

    def scale_at(self, site: Site) -> float:
        """alpha / rank, of convolutions larger than 1x1 their own."""
        if site.kernel == (1, 1):
            return super().scale_at(site)
        return 1.0 if self.conv_alpha is None else self.conv_alpha / self.rank_at(site)


network = Network(options=LoconOptions, initial=initial, forward=forward, export=export)
