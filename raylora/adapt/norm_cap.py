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
        alike: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, Tensor, float]]] = {}
        for site in adapter.sites:
            down, up = (adapter.parameters[site.name][word].detach() for word in ("down", "up"))
            layer = (down, up, adapter.scales[site.name])
            alike.setdefault((down.shape, up.shape), []).append(layer)
        # Those of one shape are measured together: a GPU is slow to be told of each by itself.
        self._alike = [list(zip(*layers, strict=True))[:2] for layers in alike.values()]
        scales = [scale for layers in alike.values() for *_, scale in layers]
        self._scales = torch.tensor(scales).to(adapter.values).abs()

    @torch.no_grad()
    def apply(self) -> dict[str, Tensor]:
        """Cap every layer; how many were capped, and the norms' mean and largest afterwards."""
        found = [_norms(torch.stack(downs), torch.stack(ups)) for downs, ups in self._alike]
        norms = self._scales * torch.cat(found)
        factors = self._most / norms.clamp(min=self._most)
        layers = [layer for downs, ups in self._alike for layer in zip(downs, ups, strict=True)]
        for (down, up), factor in zip(layers, factors.sqrt().unbind(), strict=True):
            down *= factor
            up *= factor
        capped = norms * factors
        return {
            "capped_layers": (factors < 1).sum(),
            "mean_norm": capped.mean(),
            "largest_norm": capped.max(),
        }


def _norms(downs: Tensor, ups: Tensor) -> Tensor:
    """‖up down‖ of each layer, (L,), from the two R x R products, without forming it."""
    rows_LRN, columns_LOR = downs.flatten(2), ups.flatten(2)
    gram_LRR = (columns_LOR.mT @ columns_LOR) * (rows_LRN @ rows_LRN.mT)
    return gram_LRR.sum((1, 2)).clamp(min=0).sqrt()
