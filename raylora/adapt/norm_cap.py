"""Capping what a layer's adapter may come to, so that none of them drowns its base."""

from __future__ import annotations

import torch
from torch import Tensor

from raylora.adapt.attach import Adapter
from raylora.base.site import Site


class NormCap:
    """Scales each layer's ΔW down to a largest Frobenius norm.

    Args:
        adapter: of a network with halves (`NetworkOptions.problems` refuses the others).

    Source: max-norm regularisation as sd-scripts' `--scale_weight_norms` does it: with
    n = max(‖ΔW‖, M / 2), both halves are multiplied by sqrt(M / n) where n > M. A half that is not
    trained stays, and the other takes all of it.
    """

    def __init__(self, adapter: Adapter, most: float) -> None:
        assert adapter.network.halves is not None
        self._most = most
        self._halves = adapter.network.halves
        alike: dict[tuple[torch.Size, ...], list[Site]] = {}
        for site in adapter.sites:
            shapes = tuple(tensor.shape for tensor in adapter.parameters[site.name].values())
            alike.setdefault(shapes, []).append(site)
        # Those of one shape are measured together: a GPU is slow to be told of each by itself.
        self._alike = [[_detached(adapter, site) for site in sites] for sites in alike.values()]
        sites = [site for found in alike.values() for site in found]
        self._moved = [_moved(adapter, site) for site in sites]
        scales = [adapter.scales[site.name] for site in sites]
        self._scales = torch.tensor(scales, dtype=torch.float64).to(adapter.values).abs()

    @torch.no_grad()
    def apply(self) -> dict[str, Tensor]:
        """Cap every layer; how many were capped, and the norms' mean and largest afterwards."""
        found = []
        for layers in self._alike:
            pairs = [self._halves(held) for held in layers]
            downs, ups = zip(*pairs, strict=True)
            found.append(_norms(torch.stack(downs), torch.stack(ups)))
        norms = self._scales * torch.cat(found)
        factors = self._most / norms.clamp(min=self._most)
        roots = factors.sqrt().unbind()
        for moved, whole, root in zip(self._moved, factors.unbind(), roots, strict=True):
            for half in moved:
                half *= root if len(moved) == 2 else whole
        capped = norms * factors
        return {
            "capped_layers": (factors < 1).sum(),
            "mean_norm": capped.mean(),
            "largest_norm": capped.max(),
        }


def _detached(adapter: Adapter, site: Site) -> dict[str, Tensor]:
    return {word: leaf.detach() for word, leaf in adapter.parameters[site.name].items()}


def _moved(adapter: Adapter, site: Site) -> list[Tensor]:
    """The halves of a layer that are trained."""
    held = adapter.parameters[site.name]
    return [held[word].detach() for word in ("down", "up") if held[word].requires_grad]


def _norms(downs: Tensor, ups: Tensor) -> Tensor:
    """‖up down‖ of each layer, (L,), from the two R x R products, without forming it."""
    rows_LRN, columns_LOR = downs.flatten(2), ups.flatten(2)
    gram_LRR = (columns_LOR.mT @ columns_LOR) * (rows_LRN @ rows_LRN.mT)
    return gram_LRR.sum((1, 2)).clamp(min=0).sqrt()
