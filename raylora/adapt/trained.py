"""What an adapter in training does to its layers, from its own numbers and not from a file's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from raylora.adapt.attach import Adapter
from raylora.adapt.deltas import LowRank
from raylora.base.site import Site
from raylora.networks import Network, get_network


@dataclass(frozen=True)
class Trained:
    """An adapter's numbers, copied to the CPU; what a proof compares with.

    Attributes:
        kind: `network.kind`.
        parameters: site name -> word -> tensor, as in training.
        scales: site name -> alpha / rank.
    """

    kind: str
    sites: list[Site]
    parameters: dict[str, dict[str, Tensor]]
    scales: dict[str, float]

    @property
    def network(self) -> Network:
        """Whose functions say what the numbers do."""
        return get_network(self.kind)

    def low_rank(self, site: Site) -> LowRank | None:
        """(down, up, alpha / rank) in float64; None where the network is not of low rank.

        Halves of convolutions have four dimensions, as in files, whether in training they have or
        not.
        """
        halves = self.network.halves
        if halves is None:
            return None
        down, up = halves(self._exact(site))
        if site.kind == "conv":
            down, up = (half if half.dim() == 4 else half[..., None, None] for half in (down, up))
        return down, up, self.scales[site.name]

    def merged(self, site: Site, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer's weights, float64, with the adapter in them."""
        return self.network.merged(self._exact(site), site, self.scales[site.name], held)

    def _exact(self, site: Site) -> dict[str, Tensor]:
        return {word: held.double() for word, held in self.parameters[site.name].items()}


def trained(adapter: Adapter) -> Trained:
    """A copy of what an adapter holds now."""
    kind = adapter.network.options.model_fields["kind"].default
    return Trained(
        kind,
        adapter.sites,
        {
            site.name: {
                word: held.detach().cpu().clone()
                for word, held in adapter.parameters[site.name].items()
            }
            for site in adapter.sites
        },
        dict(adapter.scales),
    )
