"""What an adapter in training does to its layers, from its own numbers and not from a file's."""

from __future__ import annotations

from raylora.adapt.attach import Adapter
from raylora.adapt.deltas import LowRank


def low_ranks(adapter: Adapter) -> dict[str, LowRank]:
    """Site name -> (down, up, alpha / rank), copied to the CPU; what a proof compares with.

    Halves of convolutions have four dimensions, as in files, whether in training they have or not.
    """
    found = {}
    for site in adapter.sites:
        held = adapter.parameters[site.name]
        down, up = (held[word].detach().cpu().clone() for word in ("down", "up"))
        if site.kind == "conv":
            down, up = (half if half.dim() == 4 else half[..., None, None] for half in (down, up))
        found[site.name] = (down, up, adapter.scales[site.name])
    return found
