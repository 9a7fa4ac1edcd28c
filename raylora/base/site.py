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
        kernel, stride, padding: of a convolution, (height, width) each.
        block: which of the family's blocks it is in, as block-wise rates count them; None where
            the family's count leaves it out.
    """

    name: str
    kind: Literal["linear", "conv"]
    inputs: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    block: int | None = None

    @property
    def component(self) -> str:
        """The model it is in: "unet", "text_encoder", …"""
        return self.name.partition(".")[0]
