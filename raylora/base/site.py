"""A place in a model where an adapter can sit; what families name and networks fill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Site:
    """One frozen layer that an adapter sits on.

    Attributes:
        name: path with its component, e.g. `unet.mid_block.attentions.0.proj_in`.
        kind: "linear", or "conv" for a convolution.
        inputs, outputs: channels in and out.
    """

    name: str
    kind: Literal["linear", "conv"]
    inputs: int
    outputs: int
