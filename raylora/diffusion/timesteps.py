"""Which timesteps are trained, and how often each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from raylora.base.options import Options, known_as
from raylora.base.seeds import draw_generator, uniforms
from raylora.diffusion.process import AnyProcess, Flow

Draw = Literal["uniform", "sigmoid", "logit_normal", "mode"]
Shift = Annotated[float, Field(gt=0)] | Literal["base", "resolution"]

# What diffusers' FlowMatchEulerDiscreteScheduler takes where a config does not say.
_SHIFTS = {
    "shift": 1.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
_PATCH = 2
"""Side in latents of what a transformer takes as one token."""


class TimestepOptions(Options):
    """Which timesteps are trained how often; their range is training.min_timestep and
    max_timestep."""

    draw: Draw | None = Field(
        None,
        json_schema_extra=known_as(
            formula="uniform: u; sigmoid: 1 / (1 + exp(-sigmoid_scale n)); logit_normal: "
            "1 / (1 + exp(-(mean + std n))); mode: 1 - u - mode_scale (cos(pi u / 2)^2 - 1 + u); "
            "u = U(0, 1], n = N(0, 1); then shift, then min_timestep to max_timestep in place of 0 "
            "to 1",
            source="logit_normal, mode: Esser et al. 2024, arXiv 2403.03206",
            sd_scripts="--timestep_sampling, --weighting_scheme",
            guides="timestep sampling, timestep bias",
        ),
    )
    """uniform: every timestep as often. sigmoid and logit_normal: the middle, where composition is
    decided, more often than nearly clean or pure noise. mode: the middle or, with a scale below 0,
    the ends. Null is the family's usual: uniform for Stable Diffusion 1, 2 and XL, logit_normal for
    SD 3 and FLUX."""
    sigmoid_scale: float = Field(
        1.0, gt=0, json_schema_extra=known_as(sd_scripts="--sigmoid_scale")
    )
    """How wide sigmoid spreads; above 1 more towards both ends, below 1 more in the middle."""
    mean: float = Field(0.0, json_schema_extra=known_as(sd_scripts="--logit_mean"))
    """Where logit_normal has its middle; below 0 is towards the clean picture: details and style;
    above 0 towards noise: composition."""
    std: float = Field(1.0, gt=0, json_schema_extra=known_as(sd_scripts="--logit_std"))
    """How wide logit_normal spreads."""
    mode_scale: float = Field(
        1.29, ge=-1, le=1.75, json_schema_extra=known_as(sd_scripts="--mode_scale")
    )
    """How strongly mode prefers the middle; 0 is uniform, below 0 prefers the ends."""
    shift: Shift | None = Field(
        None,
        json_schema_extra=known_as(
            formula="k sigma / (1 + (k - 1) sigma); resolution: k = e^mu, mu from base_shift at "
            "base_image_seq_len to max_shift at max_image_seq_len (0.5 at 256, 1.15 at 4096), "
            "straight in tokens = latent height / 2 * latent width / 2",
            source="Esser et al. 2024, arXiv 2403.03206",
            sd_scripts="--discrete_flow_shift, --training_shift; resolution: "
            "--timestep_sampling flux_shift",
            guides="shift, timestep shift",
        ),
    )
    """For flow models: move what is drawn towards noise, which large pictures need more of to be
    hidden. A number is k, and 1 moves nothing. base: the number of the base's scheduler.
    resolution: more for more pixels, by each picture's own size. Null is the family's usual: base
    for SD 3 (3.0 there), resolution for FLUX; other families have none."""

    @model_validator(mode="after")
    def _every_word_has_an_effect(self) -> Self:
        for problem in _idle_words(self) if self.draw is not None else ():
            raise ValueError(problem)
        return self

    def with_usual(self, draw: Draw, shift: Shift | None) -> Self:
        """The same with what is null filled in by what is usual in a family."""
        found = {"draw": self.draw or draw, "shift": shift if self.shift is None else self.shift}
        return self.model_copy(update=found)


def _idle_words(options: TimestepOptions) -> Iterator[str]:
    users = {
        "sigmoid_scale": "sigmoid",
        "mean": "logit_normal",
        "std": "logit_normal",
        "mode_scale": "mode",
    }
    for word, draw in users.items():
        value = getattr(options, word)
        if value != TimestepOptions.model_fields[word].default and options.draw != draw:
            yield (
                f"timesteps.{word} is {value:g}, which only {draw} uses, and timesteps.draw is "
                f"{options.draw}. Write draw: {draw}, or leave {word} out."
            )


def timestep_problems(options: TimestepOptions, process: AnyProcess, family: str) -> list[str]:
    """What of the draw cannot be for this base, one sentence each.

    Args:
        options: with the usual filled in.
        family: the word for it.
    """
    found = list(_idle_words(options))
    if options.shift is not None and not isinstance(process, Flow):
        found.append(
            f"timesteps.shift is {options.shift}: a shift is of flow models' sigmas, and {family} "
            f"has {process.steps} fixed timesteps. Leave it out; timesteps.draw: logit_normal with "
            "a timesteps.mean above 0 trains noisy ones more often."
        )
    return found


@dataclass(frozen=True, slots=True)
class TimestepSource:
    """Draws the timesteps of samples; each belongs to (seed, step, sample).

    Attributes:
        share: draws a number from 0 (clean) to 1 (noise) with a sample's generator.
        shift: tokens of a picture -> k; None shifts nothing.
        low, high: the range that is drawn from, in timesteps.
        continuous: timesteps are any numbers, float32, and not whole ones, int64.
    """

    share: Callable[[np.random.Generator], float]
    shift: Callable[[int], float] | None
    low: int
    high: int
    continuous: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of timesteps as the denoiser is told them."""
        return torch.float32 if self.continuous else torch.int64

    def draw(
        self, size: tuple[int, int], *, seed: int, step: int, samples: Sequence[int]
    ) -> Tensor:
        """One timestep a sample, (B,) on the CPU.

        Args:
            size: height and width of the batch's latents.
            samples: (B,) 64-bit sample numbers.
        """
        if self.share is draw_uniform and not self.continuous:
            return draw_timesteps(
                low=self.low, high=self.high, seed=seed, step=step, samples=samples
            )
        k = self.shift(tokens_of(size)) if self.shift else 1.0
        generators = [draw_generator(seed, step, number, "timestep") for number in samples]
        shares = [shifted(self.share(generator), k) for generator in generators]
        drawn = [self.low + (self.high - self.low) * share for share in shares]
        # float32 hides the last bit of exp and cos, which C libraries round as they please.
        exact = torch.tensor(drawn, dtype=torch.float64).float()
        return exact if self.continuous else exact.long().clamp(max=self.high - 1)


def make_timesteps(
    options: TimestepOptions,
    process: AnyProcess,
    scheduler: Mapping[str, Any],
    *,
    low: int = 0,
    high: int | None = None,
) -> TimestepSource:
    """Choose the draw once, so that the step only draws.

    Args:
        options: with the usual filled in.
        scheduler: the base's own scheduler config.
        low, high: the range; None is up to all of the base's.
    """
    shares: dict[Draw, Callable[[np.random.Generator], float]] = {
        "uniform": draw_uniform,
        "sigmoid": lambda g: sigmoid(options.sigmoid_scale * _normal(g)),
        "logit_normal": lambda g: sigmoid(options.mean + options.std * _normal(g)),
        "mode": lambda g: mode_share(1 - draw_uniform(g), options.mode_scale),
    }
    assert options.draw is not None, "with_usual fills it in"
    return TimestepSource(
        share=shares[options.draw],
        shift=_shift(options.shift, scheduler),
        low=low,
        high=process.steps if high is None else high,
        continuous=isinstance(process, Flow),
    )


def _shift(shift: Shift | None, scheduler: Mapping[str, Any]) -> Callable[[int], float] | None:
    if shift is None:
        return None
    if shift == "resolution":
        return lambda tokens: math.exp(resolution_mu(tokens, scheduler))
    k = base_shift(scheduler) if shift == "base" else float(shift)
    return lambda tokens: k


def base_shift(scheduler: Mapping[str, Any]) -> float:
    """The one number that a base's scheduler shifts its sigmas by."""
    return float(scheduler.get("shift", _SHIFTS["shift"]))


def resolution_mu(tokens: int, scheduler: Mapping[str, Any]) -> float:
    """The logarithm of the shift for a picture of so many tokens, straight in their number."""
    given = {word: value for word, value in scheduler.items() if value is not None}
    held = {**_SHIFTS, **given}
    least, most = float(held["base_shift"]), float(held["max_shift"])
    first, last = int(held["base_image_seq_len"]), int(held["max_image_seq_len"])
    return least + (most - least) * (tokens - first) / (last - first)


def tokens_of(size: tuple[int, int]) -> int:
    """Tokens of a picture whose latents have this height and width."""
    height, width = size
    return (height // _PATCH) * (width // _PATCH)


def shifted(sigma: float, k: float) -> float:
    """k sigma / (1 + (k - 1) sigma): 0 and 1 stay, and k above 1 moves what is between up."""
    return k * sigma / (1 + (k - 1) * sigma)


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), whose exponential never overflows."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def mode_share(u: float, scale: float) -> float:
    """Falls from 1 at u = 0 to 0 at u = 1, slowly in the middle.

    Source: Esser et al. 2024, arXiv 2403.03206, equation 20.
    """
    return 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)


def draw_uniform(generator: np.random.Generator) -> float:
    """In (0, 1]: sigma 0 has no noise to learn from."""
    return 1.0 - float(uniforms(generator, 1)[0])


def _normal(generator: np.random.Generator) -> float:
    return float(generator.standard_normal(dtype=np.float32))


def draw_timesteps(*, low: int, high: int, seed: int, step: int, samples: Sequence[int]) -> Tensor:
    """Uniform timesteps in [low, high), one a sample; (B,) int64 on the CPU."""
    drawn = [
        int(draw_generator(seed, step, number, "timestep").integers(low, high))
        for number in samples
    ]
    return torch.tensor(drawn, dtype=torch.int64)
