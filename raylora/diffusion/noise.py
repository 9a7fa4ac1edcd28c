"""What is drawn for a sample at a step: its noise and its timestep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raylora.base.seeds import draw_generator, draw_normal


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


def draw_timesteps(*, low: int, high: int, seed: int, step: int, samples: Sequence[int]) -> Tensor:
    """Uniform timesteps in [low, high), one a sample; (B,) int64 on the CPU."""
    drawn = [
        int(draw_generator(seed, step, number, "timestep").integers(low, high))
        for number in samples
    ]
    return torch.tensor(drawn, dtype=torch.int64)
