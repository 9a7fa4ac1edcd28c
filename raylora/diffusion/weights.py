"""How much each timestep's error counts.

For epsilon and v models every function takes (T,) or (B,) signal-to-noise ratios, not in decibels,
and gives as many weights. Ratios may be 0 (the last timestep of a zero-terminal schedule); what has
no finite limit there says so and is refused for such a schedule by `losses.loss_problems`. For flow
models it takes sigmas, the share of noise, in 0..1.
"""

from __future__ import annotations

import math
from typing import Literal, Self, get_args

from pydantic import Field, model_validator
from torch import Tensor

from raylora.base.options import Options, known_as
from raylora.diffusion.process import Prediction

_MOST_SNR = 1000.0
"""Where sd-scripts stops counting: a nearly clean timestep would otherwise weigh nothing at all."""
_GAMMA = 5.0
_LEAST_SIGMA = 1e-3
"""Of a flow model's 1000 timesteps the cleanest; drawn ones come closer to 0, and 1 / sigma^2 would
let one sample outweigh a run."""

SnrWeight = Literal["min_snr", "debiased"]
"""Weights of epsilon and v models."""
FlowWeight = Literal["sigma_sqrt", "cosmap", "x0"]
"""Weights of flow models."""
FLOW_WEIGHTS: tuple[str, ...] = get_args(FlowWeight)


class WeightOptions(Options):
    """How much each timestep counts."""

    name: Literal["none"] | SnrWeight | FlowWeight = Field(
        "none",
        json_schema_extra=known_as(
            formula="min_snr: min(SNR, gamma) / SNR (v: / (SNR + 1)); debiased: "
            "1 / sqrt(min(SNR, 1000)) (v: 1 / (min(SNR, 1000) + 1)); sigma_sqrt: 1 / sigma^2, "
            "sigma at least 0.001; cosmap: 2 / (pi (1 - 2 sigma + 2 sigma^2)); x0: sigma^2",
            source="min_snr: Hang et al. 2023, arXiv 2303.09556; debiased: Yu et al. 2023, arXiv "
            "2310.08442; cosmap: Esser et al. 2024, arXiv 2403.03206",
            sd_scripts="--min_snr_gamma, --debiased_estimation_loss (both at once there too); "
            "--weighting_scheme sigma_sqrt, cosmap; x0 is what its SD 3 always does",
            guides="min SNR gamma, debiased estimation, loss weighting",
        ),
    )
    """none: every timestep alike. For epsilon and v models: min_snr caps nearly clean samples,
    which settles training sooner; debiased lets noisy samples count more, which favours composition
    over detail. For flow models: sigma_sqrt lets nearly clean samples count very much more, cosmap
    the middle a little more; x0 compares pictures in place of slopes, so that noisy samples
    count more."""
    gamma: float = Field(
        _GAMMA,
        gt=0,
        json_schema_extra=known_as(
            formula="min(SNR, gamma)", source="arXiv 2303.09556", sd_scripts="--min_snr_gamma"
        ),
    )
    """The cap of min_snr; smaller weighs timesteps more evenly."""

    @model_validator(mode="after")
    def _gamma_caps_something(self) -> Self:
        if self.gamma != _GAMMA and self.name != "min_snr":
            raise ValueError(
                f"loss.weight.gamma is {self.gamma:g}, which only min_snr uses, and "
                f"loss.weight.name is {self.name}. Write name: min_snr, or leave gamma out."
            )
        return self


def min_snr_weight(snr: Tensor, *, gamma: float, prediction: Prediction) -> Tensor:
    """Cap each sample's pull at `gamma`, so that nearly clean samples stop dominating.

    Args:
        snr: signal-to-noise ratios.
        gamma: the cap; 5.0 in the paper.
        prediction: "epsilon" divides by snr, "v_prediction" by snr + 1, since their errors
            scale so.

    Returns:
        Weights in [0, 1]. Where snr is 0: 1 for epsilon, 0 for v.

    Source: Hang et al. 2023, arXiv 2303.09556.
    """
    if prediction == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1.0)  # not min(snr, gamma) / snr, which is 0 / 0 without signal


def debiased_weight(snr: Tensor, *, prediction: Prediction) -> Tensor:
    """Let noisy samples count more, whose errors a plain mean drowns.

    Returns:
        Weights above 0. Where snr is 0: infinite for epsilon, 1 for v.

    Source: Yu et al. 2023, arXiv 2310.08442 (epsilon); the form for v is that of sd-scripts.
    """
    capped = snr.clamp(max=_MOST_SNR)
    return 1 / (capped + 1) if prediction == "v_prediction" else 1 / capped.sqrt()


def noise_like_weight(snr: Tensor) -> Tensor:
    """Bring a v model's loss to the scale of an epsilon model's: SNR / (SNR + 1), in [0, 1)."""
    capped = snr.clamp(max=_MOST_SNR)
    return capped / (capped + 1)


def v_like_weight(snr: Tensor, *, share: float) -> Tensor:
    """Add `share` of the loss that a v model would have to an epsilon model's.

    Returns:
        1 + share * (SNR + 1) / SNR; infinite where snr is 0.
    """
    return 1 + share / noise_like_weight(snr)


def flow_weight(sigmas: Tensor, name: FlowWeight) -> Tensor:
    """What a flow model's samples count at these shares of noise.

    Returns:
        sigma_sqrt: 1 / sigma^2; cosmap: 0.64 at both ends, 1.27 in the middle; x0: sigma^2, which
        makes the squared error of the slope that of the picture.

    Source: Esser et al. 2024, arXiv 2403.03206 (cosmap).
    """
    if name == "sigma_sqrt":
        return sigmas.clamp(min=_LEAST_SIGMA) ** -2
    if name == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return sigmas**2
