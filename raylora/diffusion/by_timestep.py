"""Numbers that depend on the timestep alone: reckoned once, and looked up on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class ByTimestep:
    """A number for each timestep, so that a step copies nothing and waits for nothing.

    Args:
        values: (steps,); they are kept in float64.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.double()
        self._copies: dict[torch.device, Tensor] = {}

    def at(self, timesteps: Tensor) -> Tensor:
        """The numbers of some timesteps, (B,) float64 on their device."""
        device = timesteps.device
        if device not in self._copies:
            self._copies[device] = self._values.to(device)
        return self._copies[device][timesteps]
