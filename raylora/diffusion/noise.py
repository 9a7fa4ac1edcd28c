"""The noise that is drawn for a sample at a step, and what it is like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from raylora.base.options import Options, known_as
from raylora.base.seeds import Purpose, draw_generator, draw_normal, uniforms
from raylora.diffusion.process import AnyProcess, Flow, Prediction
from raylora.diffusion.pyramid import pyramid_noise
from raylora.diffusion.schedules import rescaled_zero_terminal

Array = NDArray[np.float32]


class NoiseOptions(Options):
    """What noise is trained on, and what is predicted of it."""

    offset: float = Field(
        0.0,
        ge=0,
        json_schema_extra=known_as(
            formula="noise + offset N(0, 1), one number a channel",
            source="Guttenberg 2023, 'Diffusion with offset noise'",
            sd_scripts="--noise_offset",
            guides="noise offset",
        ),
    )
    """Noise that is the same all over a channel, so that very dark and very bright pictures can be
    learned; 0.03 to 0.1 is usual, more washes out."""
    offset_random: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="U(0, offset) in offset's place, for each sample",
            sd_scripts="--noise_offset_random_strength (one draw for a batch there)",
        ),
    )
    """Draw the strength of the offset between 0 and `offset`, for each sample and step."""
    adaptive_scale: float = Field(
        0.0,
        json_schema_extra=known_as(
            formula="max(0, offset + adaptive_scale |mean of the channel's latents|) in offset's "
            "place",
            sd_scripts="--adaptive_noise_scale",
        ),
    )
    """Give more offset (below 0: less) to channels whose latents lie far from 0; wants `offset`,
    and is usually about as large."""
    multires_iterations: int = Field(
        0,
        ge=0,
        json_schema_extra=known_as(
            formula="noise + sum over i < n of discount^i up(N(0, 1) at size / r^i), r = U(2, 4) "
            "each; divided by the sample's deviation",
            source="Whitaker 2023, 'Multi-resolution noise for diffusion model training'",
            sd_scripts="--multires_noise_iterations (r and the deviation are a batch's there)",
            guides="multires noise, pyramid noise",
        ),
    )
    """Add noise at ever coarser sizes, this many at most, so that large shapes and brightness are
    learned better; 6 to 10 is usual, 0 is off. In place of `offset`."""
    multires_discount: float = Field(
        0.3, gt=0, le=1, json_schema_extra=known_as(sd_scripts="--multires_noise_discount")
    )
    """How much of each coarser size is kept; 0.1 to 0.3 for few images, up to 0.8 for many."""
    input_perturbation: float = Field(
        0.0,
        ge=0,
        json_schema_extra=known_as(
            formula="noisy latents of noise + gamma N(0, 1); the target keeps noise",
            source="Ning et al. 2023, arXiv 2301.11706",
            sd_scripts="--ip_noise_gamma",
            guides="input perturbation",
        ),
    )
    """Noise of the noise: what the model is shown is a little off, as it is when sampling, so that
    it learns to mend its own errors. 0.1 in the paper."""
    input_perturbation_random: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="U(0, gamma) in gamma's place, for each sample",
            sd_scripts="--ip_noise_gamma_random_strength (one draw for a batch there)",
        ),
    )
    """Draw the strength between 0 and `input_perturbation`, for each sample and step."""
    zero_terminal_snr: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="square roots of alphas_cumprod shifted and scaled: last 0, first kept",
            source="Lin et al. 2023, arXiv 2305.08891",
            sd_scripts="--zero_terminal_snr (min-SNR and debiasing go by the old SNR there)",
        ),
    )
    """Train the last timestep on pure noise, for true black and white. For bases that predict v;
    sample with a scheduler that is rescaled likewise. A base whose scheduler config has
    `rescale_betas_zero_snr` is trained so in any case."""
    prediction: Prediction | None = Field(
        None,
        json_schema_extra=known_as(
            formula="v = sqrt(alpha) noise - sqrt(1 - alpha) latents",
            source="Salimans & Ho 2022, arXiv 2202.00512",
            sd_scripts="--v_parameterization",
            guides="v prediction",
        ),
    )
    """What the base predicts; null is what its scheduler's config says. Set it only where that is
    wrong or missing, as with many single-file bases."""

    @model_validator(mode="after")
    def _every_word_has_an_effect(self) -> Self:
        for word, needs in (
            ("offset_random", "offset"),
            ("adaptive_scale", "offset"),
            ("multires_discount", "multires_iterations"),
            ("input_perturbation_random", "input_perturbation"),
        ):
            value = getattr(self, word)
            if value != NoiseOptions.model_fields[word].default and not getattr(self, needs):
                given = str(value).lower()
                raise ValueError(
                    f"noise.{word} is {given}, and noise.{needs} is 0. Set {needs}, or leave "
                    f"{word} out."
                )
        if self.offset and self.multires_iterations:
            raise ValueError(
                f"noise.offset is {self.offset:g} and noise.multires_iterations "
                f"{self.multires_iterations}: multiresolution noise has the coarse part that "
                "an offset adds, and its division by the deviation would shrink the offset. Give "
                "one of them."
            )
        return self


@dataclass(frozen=True, slots=True)
class _Key:
    """Whose numbers are drawn."""

    seed: int
    step: int
    sample: int

    def generator(self, purpose: Purpose) -> np.random.Generator:
        return draw_generator(self.seed, self.step, self.sample, purpose)

    def normal(self, shape: tuple[int, ...], purpose: Purpose) -> Array:
        return draw_normal(
            shape, seed=self.seed, step=self.step, sample=self.sample, purpose=purpose
        )

    def strength(self, most: float, purpose: Purpose, *, random: bool) -> float:
        """`most`, or a number in [0, most) where it is random."""
        return most * float(uniforms(self.generator(purpose), 1)[0]) if random else most


_Latents = NDArray[np.float64] | None
_Change = Callable[[Array, _Latents, _Key], Array]
"""(noise, latents, key) -> other noise; all (C, H, W). Latents are given where `reads_latents`."""


@dataclass(frozen=True, slots=True)
class NoiseSource:
    """Draws the noise of samples; every number belongs to (seed, step, sample) and a purpose.

    Args:
        shape: makes of plain noise the noise to predict; None leaves it plain.
        perturb: makes of it what the noisy latents are built with; None shows it as it is.
        reads_latents: whether `shape` looks at the latents.
    """

    shape: _Change | None = None
    perturb: _Change | None = None
    reads_latents: bool = False

    def draw(
        self, latents: Tensor, *, seed: int, step: int, samples: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """The noise of a batch, drawn on the CPU; (B, C, H, W) float32 there.

        Args:
            latents: (B, C, H, W). Read only with `adaptive_scale`; on a GPU that waits for it.
            samples: (B,) 64-bit sample numbers.

        Returns:
            (noise, input noise): what is to be predicted, and what the noisy latents are built
            with, None where it is the same.
        """
        size = tuple(latents.shape[1:])
        if self.shape is None and self.perturb is None:
            return draw_noise(size, seed=seed, step=step, samples=samples), None
        seen = latents.detach().cpu().double().numpy() if self.reads_latents else None
        targets, inputs = [], []
        for i, number in enumerate(samples):
            key, own = _Key(seed, step, number), None if seen is None else seen[i]
            noise = key.normal(size, "noise")
            noise = noise if self.shape is None else self.shape(noise, own, key)
            targets.append(noise)
            inputs.append(noise if self.perturb is None else self.perturb(noise, own, key))
        noise_BCHW = torch.from_numpy(np.stack(targets))
        return noise_BCHW, None if self.perturb is None else torch.from_numpy(np.stack(inputs))


def make_noise(options: NoiseOptions) -> NoiseSource:
    """Choose the noise once, so that the step only draws it; plain noise where nothing is set."""
    shape: _Change | None = None
    if options.offset:
        shape = _offset(options)
    elif options.multires_iterations:
        shape = _multires(options)
    return NoiseSource(
        shape,
        _perturbation(options) if options.input_perturbation else None,
        reads_latents=options.adaptive_scale != 0,
    )


def _offset(options: NoiseOptions) -> _Change:
    def change(noise: Array, latents: _Latents, key: _Key) -> Array:
        strength: float | NDArray[np.float64] = key.strength(
            options.offset, "noise offset strength", random=options.offset_random
        )
        if latents is not None:
            means = latents.mean((1, 2), keepdims=True)
            strength = np.maximum(strength + options.adaptive_scale * np.abs(means), 0.0)
        drawn = key.normal((len(noise), 1, 1), "noise offset").astype(np.float64)
        return (noise + strength * drawn).astype(np.float32)

    return change


def _multires(options: NoiseOptions) -> _Change:
    def change(noise: Array, latents: _Latents, key: _Key) -> Array:
        return pyramid_noise(
            noise,
            key.generator("noise pyramid"),
            iterations=options.multires_iterations,
            discount=options.multires_discount,
        )

    return change


def _perturbation(options: NoiseOptions) -> _Change:
    def change(noise: Array, latents: _Latents, key: _Key) -> Array:
        strength = key.strength(
            options.input_perturbation,
            "input noise strength",
            random=options.input_perturbation_random,
        )
        drawn = key.normal(noise.shape, "input noise").astype(np.float64)
        return (noise + strength * drawn).astype(np.float32)

    return change


def noise_problems(
    options: NoiseOptions, process: AnyProcess, family: str = "this base"
) -> list[str]:
    """What of the noise cannot be for this base, one sentence each.

    Args:
        process: the base's own.
        family: the word for it.
    """
    if isinstance(process, Flow):
        return list(_flow_problems(options, family))
    if options.zero_terminal_snr and (options.prediction or process.prediction) == "epsilon":
        return [
            "noise.zero_terminal_snr: the last timestep would be pure noise, of which a model that "
            "predicts epsilon learns nothing, and this one does. Leave it out, or use a base that "
            "predicts v (noise.prediction where its config does not say so)."
        ]
    return []


def _flow_problems(options: NoiseOptions, family: str) -> Iterator[str]:
    """Flow models end in pure N(0, 1) noise, and their prediction is not in question."""
    ends = "whose last timestep is pure N(0, 1) noise already"
    given = {
        "offset": (options.offset, f"{ends}: an offset would only train it on other noise"),
        "multires_iterations": (
            options.multires_iterations,
            f"{ends}: coarser noise would only train it on what sampling never shows it",
        ),
        "zero_terminal_snr": (options.zero_terminal_snr, ends),
        "prediction": (options.prediction, "which predicts noise - latents and nothing else"),
    }
    for word, (value, reason) in given.items():
        if value:
            shown = str(value).lower() if isinstance(value, bool) else value
            yield f"noise.{word} is {shown}, and {family} is a flow model, {reason}. Leave it out."


def trained_process(process: AnyProcess, options: NoiseOptions) -> AnyProcess:
    """The base's process as it is trained: another prediction, or no signal at the end."""
    if isinstance(process, Flow):
        return process
    if options.prediction is not None:
        process = replace(process, prediction=options.prediction)
    if options.zero_terminal_snr:
        process = replace(process, alphas_cumprod=rescaled_zero_terminal(process.alphas_cumprod))
    return process


def draw_noise(shape: tuple[int, ...], *, seed: int, step: int, samples: Sequence[int]) -> Tensor:
    """Standard normal noise, one stream a sample.

    Args:
        shape: of one sample, (C, H, W).
        samples: (B,) 64-bit sample numbers.

    Returns:
        (B, C, H, W) float32 on the CPU.
    """
    drawn = [
        draw_normal(shape, seed=seed, step=step, sample=number, purpose="noise")
        for number in samples
    ]
    return torch.from_numpy(np.stack(drawn))
