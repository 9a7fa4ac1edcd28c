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
_MOST = {"down": MOST_BLOCKS, "mid": 3, "up": MOST_BLOCKS}
_ANY = 10_000  # of a transformer, whose blocks only its config counts
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
        )
        | {"examples": ["sine+0.25", [0, 0, 0.5]]},
    )
    """A UNet's blocks on the way down, from the input on; SD 1.x and 2.x count 12, of which the
    first is never trained, SDXL 9. One number for all of them, a list (what it leaves out gets 1),
    the same as text (`1,,0.5`: a blank is 0), or a shape: sine, cosine, linear, reverse_linear,
    zeros; `sine+0.25` adds 0.25 to each."""
    mid: Written | None = Field(
        None,
        union_mode="left_to_right",
        json_schema_extra=known_as(sd_scripts="--network_args mid_lr_weight"),
    )
    """A UNet's middle block; SDXL has three: one number, or a list."""
    up: Written | None = Field(
        None,
        union_mode="left_to_right",
        json_schema_extra=known_as(sd_scripts="--network_args up_lr_weight"),
    )
    """A UNet's blocks on the way up, to the output; written as `down`."""
    double: Written | None = Field(
        None,
        union_mode="left_to_right",
        json_schema_extra={"examples": ["reverse_linear+0.5", [1, 1, 0.5]]},
    )
    """FLUX's double blocks, 19; written as `down`."""
    single: Written | None = Field(
        None, union_mode="left_to_right", json_schema_extra={"examples": [0.5]}
    )
    """FLUX's single blocks, 38; written as `down`."""
    joint: Written | None = Field(
        None, union_mode="left_to_right", json_schema_extra={"examples": [0.5]}
    )
    """SD 3's blocks, 24 of medium and 38 of 3.5 large; written as `down`."""
    zero_threshold: float = Field(
        0.0,
        ge=0,
        json_schema_extra=known_as(sd_scripts="--network_args block_lr_zero_threshold"),
    )
    """A block whose number is this or less is not trained, and has no place in the LoRA file."""

    @property
    def given(self) -> bool:
        """Whether blocks have rates of their own."""
        return any(written is not None for written in self.written.values())

    @property
    def written(self) -> dict[str, Written | None]:
        """What is given, by stretch of the model."""
        return {
            "down": self.down,
            "mid": self.mid,
            "up": self.up,
            "double": self.double,
            "single": self.single,
            "joint": self.joint,
        }

    @model_validator(mode="after")
    def _can_be_read(self) -> Self:
        if self.zero_threshold and not self.given:
            raise ValueError(
                f"optimizer.block_rates.zero_threshold is {self.zero_threshold:g}, and no block "
                "has a rate of its own. Give its stretch a rate (down, mid, up; double, single; "
                "joint), or leave it out."
            )
        for word, written in self.written.items():
            if written == []:
                raise ValueError(
                    f"optimizer.block_rates.{word} is an empty list. Give a number for each block, "
                    "or leave it out."
                )
            try:
                _weights(written, _MOST.get(word, _ANY), word)
            except OptionError as error:
                raise ValueError(str(error)) from error
        return self


def block_weights(
    rates: BlockRates, counts: tuple[int, int, int], *, ends: bool = False
) -> list[float]:
    """The factor on the denoiser's rate of each block, by the block's index.

    Args:
        counts: blocks on the way down, in the middle and up: (12, 1, 12) for SD 1.x, whose indices
            are 1 + 3i + j down (j = 2 is a sampler; 0 is never used), 12, and 13 + 3i + j up;
            (9, 3, 9) for SDXL. Transformers have no middle: (double, 0, single), or (joint, 0, 0).
        ends: with one block of factor 1 before and after them, as SDXL's embeddings and output.

    Raises:
        OptionError: what is written is no shape, is negative, has more numbers than blocks, or is
            for blocks that the base has not.
    """
    stretches = _stretches(counts)
    for word, written in rates.written.items():
        if written is not None and word not in stretches:
            raise OptionError(
                f"optimizer.block_rates.{word} is given, and this base has no such blocks. It has "
                f"{', '.join(stretches)}."
            )
    parts = [_weights(rates.written[word], count, word) for word, count in stretches.items()]
    weights = [w if w > rates.zero_threshold else 0.0 for part in parts for w in part]
    return [1.0, *weights, 1.0] if ends else weights


def _stretches(counts: tuple[int, int, int]) -> dict[str, int]:
    """How many blocks each stretch of the model has, in the order that they are counted."""
    first, middle, last = counts
    if middle:
        return {"down": first, "mid": middle, "up": last}
    return {"double": first, "single": last} if last else {"joint": first}


def _weights(written: Written | None, count: int, word: str) -> list[float]:
    option = f"optimizer.block_rates.{word}"
    if written is None:
        return [1.0] * count
    if isinstance(written, float | int):
        numbers = [float(written)] * count
    elif isinstance(written, list):
        numbers = written
    elif written[:1].isalpha():
        if word == "mid":
            raise OptionError(f"{option} is {written!r}: a shape needs many blocks. Give numbers.")
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
    rising = [i / max(count - 1, 1) for i in range(count)]
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
