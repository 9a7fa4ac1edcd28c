"""The forward process of epsilon and v models: how latents are noised and what is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from raylora.diffusion.by_timestep import ByTimestep

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Process:
    """Variance-preserving diffusion over discrete timesteps.

    Attributes:
        prediction: what the denoiser was trained to predict.
        alphas_cumprod: (steps,) float64, share of signal left.

    Source: Ho et al. 2020 (epsilon); Salimans & Ho 2022, arXiv 2202.00512 (v).
    """

    prediction: Prediction
    alphas_cumprod: Tensor

    @property
    def steps(self) -> int:
        """How many timesteps the base model was trained on."""
        return len(self.alphas_cumprod)

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents at their timesteps; all (B, C, H, W), timesteps (B,) int64."""
        signal, sigma = self._scales(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the prediction is compared with, (B, C, H, W)."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._scales(timesteps, latents)
        return signal * noise - sigma * latents

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio, (B,) float64, not in decibels."""
        return self._snr.at(timesteps)

    @property
    def snr_by_timestep(self) -> Tensor:
        """Signal-to-noise ratio alpha / (1 - alpha) of every timestep, (steps,) float64."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    def _scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        signal, sigma = (table.at(timesteps).view(-1, 1, 1, 1) for table in self._shares)
        return signal.to(like.dtype), sigma.to(like.dtype)

    @cached_property
    def _snr(self) -> ByTimestep:
        return ByTimestep(self.snr_by_timestep)

    @cached_property
    def _shares(self) -> tuple[ByTimestep, ByTimestep]:
        alphas = self.alphas_cumprod
        return ByTimestep(alphas.sqrt()), ByTimestep((1.0 - alphas).sqrt())
