"""What a job needs, in numbers that any batch, card and setting can be worked out from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raylora.memory.setting import Checkpointing


@dataclass(frozen=True)
class Line:
    """Bytes that are held at one moment: `constant + per_image * images`."""

    constant: int
    per_image: int

    def at(self, images: int) -> int:
        """With so many images together."""
        return self.constant + self.per_image * images


@dataclass(frozen=True)
class Curve:
    """The most that is held at once, for any number of images.

    Attributes:
        lines: moments of which each is the fullest for some number of images.
    """

    lines: tuple[Line, ...]

    def at(self, images: int) -> int:
        """Bytes with so many images together."""
        return max((line.at(images) for line in self.lines), default=0)


@dataclass(frozen=True)
class Work:
    """What is computed, for one image.

    Attributes:
        matmul_flops: of matrix products and convolutions; two for a multiply-add.
        attention_flops: of attention between tokens.
        moved_bytes: read and written by all other operations.
        launches: operations that start work on the device, whatever the number of images.
    """

    matmul_flops: int
    attention_flops: int
    moved_bytes: int
    launches: int

    @property
    def flops(self) -> int:
        """Of both kinds."""
        return self.matmul_flops + self.attention_flops


@dataclass(frozen=True)
class StepNeed:
    """A training step of one bucket with one kind of checkpointing, in one arithmetic.

    Attributes:
        dynamic: bytes beyond what lies there all the time (weights, adapter, its gradients,
            optimizer's states).
        inputs_per_image: of `dynamic`, what units that are computed again keep of their inputs from
            the forward pass; what `Setting.offload` moves to the host.
        work: forward, what is computed again, backward.
    """

    dynamic: Curve
    inputs_per_image: int
    work: Work


@dataclass(frozen=True)
class UnitNeed:
    """The weights of a unit, in numbers rather than bytes.

    Attributes:
        linear_numbers: weights of linears, which may be held in fewer bits.
        other_numbers: everything else: convolutions, norms, biases, buffers.
        largest_linear: numbers of its largest linear, which is there in full for a moment where it
            is held in fewer bits.
        linear_rows: outputs of its linears together, for scales held a row.
    """

    name: str
    linear_numbers: int
    other_numbers: int
    largest_linear: int
    linear_rows: int


@dataclass(frozen=True)
class ModelNeed:
    """The weights of a model.

    Attributes:
        units: in the order in which they run; empty where it has none.
        other_numbers: all weights and buffers outside of them.
    """

    units: tuple[UnitNeed, ...]
    other_numbers: int

    @property
    def numbers(self) -> int:
        """All of them."""
        return self.other_numbers + sum(u.linear_numbers + u.other_numbers for u in self.units)


@dataclass(frozen=True)
class Need:
    """All that planning a job asks of its models, at its largest bucket.

    Attributes:
        denoiser: its weights.
        text_encoders: component -> weights.
        vae: numbers of its weights.
        bucket: (width, height) in pixels.
        arithmetic: `training.precision` that `steps` were measured in; bytes of activations of
            another may not be worked out from them.
        steps: kind of checkpointing -> a step with all units resident and held in full.
        predict: a prediction without gradients: validating, drawing, looking at the first file.
        encode, decode: the VAE in float32, without its weights; `decode_tiled` in tiles.
        read_text: component -> a caption through a text encoder in float32, without its weights.
        adapter_numbers: trained numbers.
        adapter_constants: those that are not trained.
        trains_text: component names of text encoders that stay for training; their weights are in
            training's arithmetic.
    """

    denoiser: ModelNeed
    text_encoders: Mapping[str, ModelNeed]
    vae: int
    bucket: tuple[int, int]
    arithmetic: str
    steps: Mapping[Checkpointing, StepNeed]
    predict: StepNeed
    encode: Curve
    decode: Curve
    decode_tiled: Curve
    read_text: Mapping[str, Curve]
    adapter_numbers: int
    adapter_constants: int = 0
    trains_text: tuple[str, ...] = field(default=())
