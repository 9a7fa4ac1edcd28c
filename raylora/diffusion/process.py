"""The forward process: how latents are noised, and what is predicted of it.

`Process` is that of epsilon and v models, `Flow` that of flow models (SD 3, FLUX). What needs a
signal-to-noise ratio or a table of timesteps asks for a `Process`; all else takes either.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from torch import Tensor

from raylora.diffusion.by_timestep import ByTimestep

Prediction = Literal["epsilon", "v_prediction"]
"""What a model of `Process` predicts."""


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


@dataclass(frozen=True)
class Flow:
    """Straight lines from pictures to noise, which a rectified-flow model learns the slope of.

    A timestep is sigma times `steps`, and any number between 0 (the picture) and `steps` (noise).

    Attributes:
        prediction: told apart from a `Process` by it.
        steps: what the model calls sigma 1.

    Source: Liu et al. 2022, arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206.
    """

    prediction: Literal["flow"] = "flow"
    steps: int = 1000

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents at their timesteps; all (B, C, H, W), timesteps (B,) of any dtype."""
        # In float64: float32 would lose the last bits of 1 - sigma where sigma is small.
        sigma = self.sigmas(timesteps).view(-1, 1, 1, 1)
        return (1.0 - sigma).to(latents.dtype) * latents + sigma.to(latents.dtype) * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the prediction is compared with, (B, C, H, W): the same at every timestep."""
        return noise - latents

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """Share of noise at each timestep, (B,) float64 in 0..1."""
        return timesteps.double() / self.steps


AnyProcess: TypeAlias = Process | Flow
"""What a base may have been trained as."""
