"""A frozen adapter beneath the one that is trained: on while training, off for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylora.adapt.attach import Adapter
from raylora.adapt.lora_file import AdapterFile, AdapterModule
from raylora.adapt.onto import check_sizes, onto, refuse_left
from raylora.base.errors import WeightsError
from raylora.base.site import Place, Site
from raylora.networks import get_network


def frozen_adapter(
    file: AdapterFile,
    sites: Sequence[Site],
    place: Callable[[str], Place],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Adapter:
    """A LoRA file as an adapter of which nothing is trained.

    Args:
        sites: the layers that it may change; it need not have all of them.
        place: where files keep a site's layer.

    Raises:
        WeightsError: it has other layers, or of another size, or is no plain LoRA.
    """
    modules, left = onto(file, sites, place)
    refuse_left(left)
    wrong = [module.name for module in modules.values() if not module.is_low_rank]
    if wrong:
        raise WeightsError(
            f"{wrong[0]} is of kind {modules[wrong[0]].kind}, and only LoRA and LoCon can lie "
            "under another adapter. Convert it to LoRA, or merge it with family.loras."
        )
    held = [site for site in sites if site.name in modules]
    for site in held:
        check_sizes(modules[site.name], site)
    return Adapter(
        get_network("locon"),
        held,
        {site.name: _halves(modules[site.name], site) for site in held},
        {name: module.alpha / module.rank for name, module in modules.items()},
        dtype=dtype,
        device=device,
        constants={site.name: frozenset({"down", "up"}) for site in held},
    )


def _halves(module: AdapterModule, site: Site) -> dict[str, NDArray[np.float64]]:
    """In the shapes of `networks/lora.py`: flat but for a larger kernel."""
    down, up, _ = module.low_rank
    return {"down": _array(down.flatten(1) if site.kernel == (1, 1) else down), "up": _array(up)}


def _array(half: Tensor) -> NDArray[np.float64]:
    flat = half.flatten(1) if half.dim() == 4 and half.shape[2:] == (1, 1) else half
    return np.asarray(flat.double().numpy(), dtype=np.float64)
