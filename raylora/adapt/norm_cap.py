"""Capping what a layer's adapter may come to, so that none of them drowns its base."""

from __future__ import annotations

import torch
from torch import Tensor

from raylora.adapt.attach import Adapter


class NormCap:
    """Scales each layer's ΔW down to a largest Frobenius norm.

    Source: max-norm regularisation as sd-scripts' `--scale_weight_norms` does it: with
    n = max(‖ΔW‖, M / 2), both halves are multiplied by sqrt(M / n) where n > M.
    """

    def __init__(self, adapter: Adapter, most: float) -> None:
        self._most = most
        self._layers = [
            (adapter.parameters[site.name]["down"], adapter.parameters[site.name]["up"])
            for site in adapter.sites
        ]
        device, dtype = adapter.values.device, adapter.values.dtype
        self._scales = torch.tensor(
            [adapter.scales[site.name] for site in adapter.sites], dtype=dtype, device=device
        )

    @torch.no_grad()
    def apply(self) -> dict[str, Tensor]:
        """Cap every layer; how many were capped, and the norms' mean and largest afterwards."""
        norms = self._scales.abs() * torch.stack([_norm(down, up) for down, up in self._layers])
        norms = norms.clamp(min=self._most / 2)
        factors = (self._most / norms).clamp(max=1.0)
        for (down, up), factor in zip(self._layers, factors.sqrt(), strict=True):
            down *= factor
            up *= factor
        capped = norms * factors
        return {
            "capped_layers": (factors < 1).sum(),
            "mean_norm": capped.mean(),
            "largest_norm": capped.max(),
        }


def _norm(down: Tensor, up: Tensor) -> Tensor:
    """‖up down‖ from the two R x R products, without forming it."""
    rows_RN, columns_OR = down.flatten(1), up.flatten(1)
    gram = (columns_OR.T @ columns_OR) * (rows_RN @ rows_RN.T)
    return gram.sum().clamp(min=0).sqrt()
