"""Rates by block of the denoiser: what is written in a job, and the number for each block."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from raylora.base.errors import OptionError
from raylora.base.lookup import did_you_mean
from raylora.base.options import Options, known_as

MOST_BLOCKS = 12
"""On the way down, and on the way up, of any UNet."""
Written = str | float | list[float]

_PRESETS = ("cosine", "linear", "reverse_linear", "sine", "zeros")


class BlockRates(Options):
    """How much of the denoiser's rate each of its blocks gets; 0 trains nothing there."""

    down: Written | None = Field(
        None,
        union_mode="left_to_right",
        json_schema_extra=known_as(
            formula="rate of a block = denoiser's rate * its number; of n blocks, block i gets "
            "sine sin(pi/2 i/(n-1)), linear i/(n-1), cosine and reverse_linear the same from the "
            "other end",
            sd_scripts="--network_args down_lr_weight",
            guides="block weights",
        ),
    )
    """Blocks on the way down, from the input on; SD 1.x counts 12, of which the first is never
    trained. One number for all of them, a list (what it leaves out gets 1), the same as text
    (`1,,0.5`: a blank is 0), or a shape: sine, cosine, linear, reverse_linear, zeros; `sine+0.25`
    adds 0.25 to each."""
    mid: Written | None = Field(
        None,
        union_mode="left_to_right",
        json_schema_extra=known_as(sd_scripts="--network_args mid_lr_weight"),
    )
    """The middle block: one number, or a list where there are several."""
    up: Written | None = Field(
        None,
        union_mode="left_to_right",
        json_schema_extra=known_as(sd_scripts="--network_args up_lr_weight"),
    )
    """Blocks on the way up, to the output; written as `down`."""
    zero_threshold: float = Field(
        0.0,
        ge=0,
        json_schema_extra=known_as(sd_scripts="--network_args block_lr_zero_threshold"),
    )
    """A block whose number is this or less is not trained, and has no place in the LoRA file."""

    @property
    def given(self) -> bool:
        """Whether blocks have rates of their own."""
        return not (self.down is None and self.mid is None and self.up is None)

    @model_validator(mode="after")
    def _can_be_read(self) -> Self:
        if self.zero_threshold and not self.given:
            raise ValueError(
                f"optimizer.block_rates.zero_threshold is {self.zero_threshold:g}, and no block "
                "has a rate of its own. Give down, mid or up, or leave it out."
            )
        for word in ("down", "mid", "up"):
            if getattr(self, word) in ((), []):
                raise ValueError(
                    f"optimizer.block_rates.{word} is an empty list. Give a number for each block, "
                    "or leave it out."
                )
        try:
            block_weights(self)
        except OptionError as error:
            raise ValueError(str(error)) from error
        return self


def block_weights(
    rates: BlockRates, counts: tuple[int, int, int] = (12, 1, 12), *, ends: bool = False
) -> list[float]:
    """The factor on the denoiser's rate of each block, by the block's index.

    Args:
        counts: blocks on the way down, in the middle and up: (12, 1, 12) for SD 1.x, whose indices
            are 1 + 3i + j down (j = 2 is a sampler; 0 is never used), 12, and 13 + 3i + j up;
            (9, 3, 9) for SDXL.
        ends: with one block of factor 1 before and after them, as SDXL's embeddings and output.

    Raises:
        OptionError: what is written is no shape, is negative, or has more numbers than blocks.
    """
    parts = [
        _weights(written, count, f"optimizer.block_rates.{word}", shapes=word != "mid")
        for word, written, count in zip(
            ("down", "mid", "up"), (rates.down, rates.mid, rates.up), counts, strict=True
        )
    ]
    weights = [w if w > rates.zero_threshold else 0.0 for part in parts for w in part]
    return [1.0, *weights, 1.0] if ends else weights


def _weights(written: Written | None, count: int, option: str, *, shapes: bool) -> list[float]:
    if written is None:
        return [1.0] * count
    if isinstance(written, float | int):
        numbers = [float(written)] * count
    elif isinstance(written, list):
        numbers = written
    elif written[:1].isalpha():
        if not shapes:
            raise OptionError(
                f"{option} is {written!r}: a shape needs several blocks. Give numbers."
            )
        numbers = _shape(written, count, option)
    else:
        numbers = _numbers(written, option)
    if len(numbers) > count:
        raise OptionError(
            f"{option} has {len(numbers)} numbers, and there are {count} such blocks. Leave out "
            "those at the end."
        )
    if min(numbers, default=0.0) < 0:
        raise OptionError(
            f"{option} has {min(numbers):g}: no block can have less than 0, which does not train "
            "it. A negative optimizer.denoiser_rate turns all blocks around."
        )
    return [*numbers, *[1.0] * (count - len(numbers))]


def _numbers(written: str, option: str) -> list[float]:
    try:
        return [float(word) if word.strip() else 0.0 for word in written.split(",")]
    except ValueError:
        raise OptionError(
            f"{option} is {written!r}, which is neither numbers with commas nor one of "
            f"{', '.join(_PRESETS)}."
        ) from None


def _shape(written: str, count: int, option: str) -> list[float]:
    name, _, base = written.partition("+")
    try:
        added = float(base) if base else 0.0
    except ValueError:
        raise OptionError(
            f"{option} is {written!r}: after + comes a number, e.g. sine+0.25."
        ) from None
    rising = [i / (count - 1) for i in range(count)]
    waves = [math.sin(math.pi * x / 2) for x in rising]
    shapes = {
        "sine": waves,
        "cosine": waves[::-1],
        "linear": rising,
        "reverse_linear": rising[::-1],
        "zeros": [0.0] * count,
    }
    if name not in shapes:
        raise OptionError(
            f"{option} is {written!r}, which is not known.{did_you_mean(name, shapes)}"
        )
    return [weight + added for weight in shapes[name]]
