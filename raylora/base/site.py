"""A place in a model where an adapter can sit, and where other programs' files keep it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["attention", "mlp", "projection", "modulation", "residual", "embedder", "norm"]
"""What a layer does; what the presets of `network.layers` choose by.

attention: q, k, v and out. mlp: the feed-forward layers. projection: into and out of a UNet's
transformer. modulation: what scales and shifts by the timestep within a block. residual: a UNet's
residual blocks and samplers. embedder: outside of the blocks, of text, time, pixels and the last
layer. norm: scale and shift of a normalisation.
"""


@dataclass(frozen=True)
class Site:
    """One frozen layer that an adapter sits on.

    Attributes:
        name: path with its component, e.g. `unet.mid_block.attentions.0.proj_in`.
        kind: "linear", "conv" for a convolution, or "norm", whose inputs and outputs are its width.
        inputs, outputs: channels in and out.
        kernel, stride, padding: of a convolution, (height, width) each.
        block: which of the family's blocks it is in, as block-wise rates count them; None where
            the family's count leaves it out.
        role: what it does.
        section: the family's own word for the stretch of the model it is in ("down", "mid", "up";
            "double", "single"; "joint"; "text"), with `number` its place there.
        number: index within the section.
        bias: whether the layer has one, or a norm a shift.
    """

    name: str
    kind: Literal["linear", "conv", "norm"]
    inputs: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    block: int | None = None
    role: Role = "attention"
    section: str = ""
    number: int = 0
    bias: bool = field(default=True, compare=False)

    @property
    def component(self) -> str:
        """The model it is in: "unet", "transformer", "text_encoder", "text_encoder_2", …"""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Place:
    """Where kohya's and ComfyUI's files keep a layer.

    Attributes:
        prefix: of kohya's names: "lora_unet", "lora_te", "lora_te1", …
        path: dotted path in the model as its makers wrote it; kohya's name is made of it.
        rows: (first, one past the last, all) outputs of the file's module that are this layer's,
            where the file joins several layers in one; None where it is alone.
        halves_swapped: the file's module has the two halves of the outputs in the other order.
    """

    prefix: str
    path: str
    rows: tuple[int, int, int] | None = None
    halves_swapped: bool = False

    @property
    def kohya(self) -> str:
        """The module's name in kohya's files."""
        return f"{self.prefix}_{self.path.replace('.', '_')}"
