"""Starting from a LoRA file instead of from fresh weights, with the file's alpha honoured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raylora.adapt.keys import component_of, kohya_name
from raylora.adapt.lora_file import DOWN, UP, AdapterFile, AdapterModule
from raylora.base.errors import WeightsError
from raylora.base.lookup import some_of
from raylora.base.site import Site
from raylora.networks import NetworkOptions

Weights = Mapping[str, NDArray[np.float64]]
"""One site's parameters by word."""
_NAMED = 3  # layers that a message names


@dataclass(frozen=True)
class Initial:
    """What a run starts from.

    Attributes:
        sites: that carry the adapter, in the model's order.
        weights: site name -> "down", "up" in the shapes of `networks/lora.py`.
        scales: site name -> alpha / rank.
    """

    sites: list[Site]
    weights: dict[str, Weights]
    scales: dict[str, float]


def initial_weights(
    file: AdapterFile,
    sites: Sequence[Site],
    options: NetworkOptions,
    fresh: Callable[[Site], Weights],
) -> Initial:
    """First weights of a run that continues from a file, with exactly the file's ΔW.

    Without `options.initial_ranks` the job chooses layers, ranks and alpha: `up` is rescaled where
    the file's alpha / rank is another, and layers that the file leaves out start fresh. With it the
    file chooses all three.

    Args:
        sites: that the job trains.
        fresh: a site's weights where the file has none.

    Raises:
        WeightsError: the file has layers that the job does not train or other ranks than the job,
            or is for another base.
    """
    # Where both halves are zero, training would never move them: such a module only fills a file.
    modules = {name: module for name, module in file.modules.items() if not _is_empty(module)}
    _refuse_untrained(modules, sites)
    if options.initial_ranks:
        return weights_of(modules, sites)
    held = {site.name: modules.get(kohya_name(site.name)) for site in sites}
    _refuse_other_ranks(sites, held, options)
    weights: dict[str, Weights] = {}
    for site in sites:
        module = held[site.name]
        if module is None:
            weights[site.name] = fresh(site)
            continue
        found = site_weights(module, site)
        factor = module.alpha / module.rank / options.scale_at(site)
        weights[site.name] = {"down": found["down"], "up": found["up"] * factor}
    return Initial(list(sites), weights, {site.name: options.scale_at(site) for site in sites})


def weights_of(modules: Mapping[str, AdapterModule], sites: Sequence[Site]) -> Initial:
    """A file's own weights, ranks and scales on those of the sites that it has.

    Raises:
        WeightsError: a layer of the file is of another size in this base.
    """
    adapted = [site for site in sites if kohya_name(site.name) in modules]
    held = {site.name: modules[kohya_name(site.name)] for site in adapted}
    return Initial(
        adapted,
        {site.name: site_weights(held[site.name], site) for site in adapted},
        {name: module.alpha / module.rank for name, module in held.items()},
    )


def site_weights(module: AdapterModule, site: Site) -> dict[str, NDArray[np.float64]]:
    """A file's halves in the shapes that training has: (R, I) or (R, I, kh, kw), and (O, R).

    Raises:
        WeightsError: they are for a layer of another size.
    """
    down, up = module.tensors[DOWN], module.tensors[UP]
    inputs, outputs, kernel = down.shape[1], up.shape[0], (*down.shape[2:], 1, 1)[:2]
    if (inputs, outputs) != (site.inputs, site.outputs):
        raise WeightsError(
            f"{module.name}: the file's layer goes from {inputs} to {outputs} channels, the base's "
            f"from {site.inputs} to {site.outputs}. The LoRA is for another base."
        )
    if kernel != site.kernel:
        raise WeightsError(
            f"{module.name}: the file's layer has a kernel of {_times(kernel)}, the base's of "
            f"{_times(site.kernel)}. The LoRA is for another base."
        )
    return {"down": _float64(down.flatten(1) if kernel == (1, 1) else down), "up": _flat(up)}


def _is_empty(module: AdapterModule) -> bool:
    return not (module.tensors[DOWN].any() or module.tensors[UP].any())


def _refuse_untrained(modules: Mapping[str, AdapterModule], sites: Sequence[Site]) -> None:
    trained = {kohya_name(site.name) for site in sites}
    left = [name for name in modules if name not in trained]
    if not left:
        return
    components = {site.component for site in sites}
    if any(component_of(name) not in components for name in left):
        remedy = "set network.train: both"
    elif any("resnets" in name or "samplers" in name for name in left):
        remedy = "set network.kind: locon"
    else:
        remedy = (
            "train them too (network.layers, optimizer.block_rates), or name the base that the "
            "file is for"
        )
    raise WeightsError(
        f"network.initial has {len(left)} layers that this job does not train, "
        f"{some_of(left, _NAMED)}. So that nothing of it is lost, {remedy}; or start from another "
        "file."
    )


def _refuse_other_ranks(
    sites: Sequence[Site], held: Mapping[str, AdapterModule | None], options: NetworkOptions
) -> None:
    wrong = [
        f"{site.name} (rank {module.rank}, the job's is {options.rank_at(site)})"
        for site in sites
        if (module := held[site.name]) is not None and module.rank != options.rank_at(site)
    ]
    if wrong:
        raise WeightsError(
            f"network.initial has other ranks than this job at {len(wrong)} layers: "
            f"{some_of(wrong, _NAMED)}. Set network.initial_ranks: true in place of network.rank "
            "to take the file's, or set network.rank to them."
        )


def _times(kernel: tuple[int, ...]) -> str:
    return "x".join(map(str, kernel))


def _flat(tensor: Tensor) -> NDArray[np.float64]:
    return _float64(tensor.flatten(1))


def _float64(tensor: Tensor) -> NDArray[np.float64]:
    """float64 holds any dtype of a file."""
    return np.asarray(tensor.double().numpy(), dtype=np.float64)
