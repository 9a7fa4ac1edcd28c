"""Noise schedules: how much signal is left at each timestep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raylora.base.errors import WeightsError


def alphas_cumprod(scheduler_config: Mapping[str, Any]) -> Tensor:
    """Share of signal left at each timestep, from a base model's scheduler config.

    Returns:
        (num_train_timesteps,) float64 in (0, 1), falling; the last is 0 where the config has
        `rescale_betas_zero_snr`.

    Raises:
        WeightsError: the config names a beta schedule raylora does not know.

    Source: Ho et al. 2020 (linear), Rombach et al. 2022 (scaled_linear: linear in the square root).
    """
    steps = int(scheduler_config.get("num_train_timesteps", 1000))
    start = float(scheduler_config["beta_start"])
    end = float(scheduler_config["beta_end"])
    kind = scheduler_config.get("beta_schedule", "linear")
    if kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    else:
        raise WeightsError(
            f"scheduler_config.json has beta_schedule {kind!r}; raylora knows scaled_linear and "
            "linear."
        )
    shares = torch.cumprod(1.0 - betas, dim=0)
    rescaled = bool(scheduler_config.get("rescale_betas_zero_snr"))
    return rescaled_zero_terminal(shares) if rescaled else shares


def rescaled_zero_terminal(alphas_cumprod: Tensor) -> Tensor:
    """The same schedule stretched so that nothing of the signal is left at the last timestep.

    A model whose last timestep still shows a little of the picture learns to take the picture's
    mean brightness from it; a sampler starts from pure noise, where there is none.

    Args:
        alphas_cumprod: (steps,) float64, falling.

    Returns:
        (steps,) float64; the first is kept, the last is 0. Stretched are the square roots.

    Source: Lin et al. 2023, arXiv 2305.08891, algorithm 1.
    """
    signal = alphas_cumprod.sqrt()
    first, last = signal[0], signal[-1]
    rescaled = ((signal - last) * (first / (first - last))).square()
    rescaled[0] = alphas_cumprod[0]
    return rescaled
