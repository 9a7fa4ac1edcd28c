"""An adapter as a LoRA file holds it, on the layers of a base."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raylora.adapt.attach import Adapter
from raylora.adapt.initial import weights_of
from raylora.adapt.lora_file import read_adapter
from raylora.adapt.merge import fitted
from raylora.adapt.onto import Names
from raylora.adapt.parameters import network_of
from raylora.base.errors import WeightsError
from raylora.base.site import Site
from raylora.networks import get_network


def adapter_on(
    sites: Sequence[Site], names: Names, file: bytes, *, dtype: torch.dtype, device: torch.device
) -> Adapter:
    """The adapter of a LoRA file, with the file's own rank and alpha at every layer.

    Args:
        sites: every layer of the base; those that the file leaves out stay bare.
        names: what files call them.

    Raises:
        WeightsError: not a LoRA file, or one for another base.
    """
    modules = fitted(read_adapter(file), sites, names)
    kinds = {network_of(module) for module in modules.values()}
    if len(kinds) != 1:
        raise WeightsError(
            f"the file has {len(kinds)} kinds of network ({', '.join(sorted(kinds))}), and one "
            "picture is drawn with one."
        )
    (kind,) = kinds
    held = weights_of(modules, sites)
    return Adapter(
        get_network(kind), held.sites, held.weights, held.scales, dtype=dtype, device=device
    )
