"""Starting from a LoRA file instead of from fresh weights, with the file's alpha honoured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raylora.adapt.kinds import DORA
from raylora.adapt.lora_file import AdapterFile, AdapterModule
from raylora.adapt.onto import Names, check_sizes, onto, refuse_left
from raylora.adapt.parameters import network_of, parameters_of, scale_in
from raylora.adapt.recognise import refuse_others
from raylora.base.errors import WeightsError
from raylora.base.lookup import some_of
from raylora.base.site import Site
from raylora.networks import NetworkOptions, get_network
from raylora.networks.dora import DoraOptions
from raylora.networks.lycoris import LycorisOptions

Weights = Mapping[str, NDArray[np.float64]]
"""One site's parameters by word."""
_NAMED = 3  # layers that a message names


@dataclass(frozen=True)
class Initial:
    """What a run starts from.

    Attributes:
        sites: that carry the adapter, in the model's order.
        weights: site name -> parameters by word, in the network's shapes.
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
    names: Names,
    every: Sequence[Site],
) -> Initial:
    """First weights of a run that continues from a file, with exactly the file's change.

    Without `options.initial_ranks` the job chooses layers, ranks and alpha: `up` is rescaled where
    the file's alpha / rank is another, and layers that the file leaves out start fresh. With it the
    file chooses all three.

    Args:
        sites: that the job trains.
        fresh: a site's weights where the file has none.
        names: what files call the base's layers.
        every: all layers of the base, so that nothing of the file is lost without a word.

    Raises:
        WeightsError: the file has layers that the job does not train, other ranks than the job or
            another kind of network, or is for another base.
    """
    try:
        refuse_others(file, names.kind)
        found, left = onto(file, every, names.place)
        refuse_left(left)
    except WeightsError as error:
        raise WeightsError(f"network.initial: {error}") from error
    # Where both halves are zero, training would never move them: such a module only fills a file.
    modules = {name: module for name, module in found.items() if not module.is_empty}
    _refuse_untrained(modules, sites, every)
    _refuse_other_kinds(modules, options)
    if options.initial_ranks:
        held_there = weights_of(modules, sites)
        weights = {
            site.name: _with_constants(held_there.weights[site.name], site, options, fresh)
            for site in held_there.sites
        }
        return replace(held_there, weights=weights)
    held = {site.name: modules.get(site.name) for site in sites}
    _refuse_other_ranks(sites, held, options)
    weights = {}
    for site in sites:
        module = held[site.name]
        if module is None:
            weights[site.name] = fresh(site)
            continue
        check_sizes(module, site)
        _refuse_other_form(module, site, options)
        weights[site.name] = _with_constants(_at_scale(module, site, options), site, options, fresh)
    return Initial(list(sites), weights, {site.name: options.scale_at(site) for site in sites})


def weights_of(modules: Mapping[str, AdapterModule], sites: Sequence[Site]) -> Initial:
    """A file's own weights, ranks and scales on those of the sites that it has.

    Args:
        modules: by site; of one network (`parameters.network_of`).

    Raises:
        WeightsError: a layer of the file is of another size in this base.
    """
    adapted = [site for site in sites if site.name in modules]
    for site in adapted:
        check_sizes(modules[site.name], site)
    return Initial(
        adapted,
        {site.name: parameters_of(modules[site.name], site) for site in adapted},
        {site.name: scale_in(modules[site.name], site) for site in adapted},
    )


def _with_constants(
    found: Weights, site: Site, options: NetworkOptions, fresh: Callable[[Site], Weights]
) -> Weights:
    """A file's parameters with those that no file has, as DoRA's `norm_gradient`."""
    kept = get_network(options.kind).constants(options, site) - set(found)
    begun = fresh(site) if kept else {}
    return {**found, **{word: begun[word] for word in kept & set(begun)}}


def _at_scale(module: AdapterModule, site: Site, options: NetworkOptions) -> Weights:
    """The module's parameters under the job's alpha / rank."""
    found = parameters_of(module, site)
    own, wanted = scale_in(module, site), options.scale_at(site)
    if own == wanted:
        return found
    if "up" in found:
        return {**found, "up": found["up"] * (own / wanted)}
    if module.kind in ("oft", "boft") and not own:
        return found  # no limit in the file, and what it holds is within the one it had
    raise WeightsError(
        f"network.initial has a strength of {own:g} at {site.name}, and the job of {wanted:g}. "
        f"Set network.alpha so that it is the file's (alpha / rank; its rank is {module.rank})."
    )


def _refuse_untrained(
    modules: Mapping[str, AdapterModule], sites: Sequence[Site], every: Sequence[Site]
) -> None:
    trained = {site.name for site in sites}
    left = [site for site in every if site.name in modules and site.name not in trained]
    if not left:
        return
    components = {site.component for site in sites}
    if any(site.component not in components for site in left):
        remedy = "set network.train: both"
    elif any(site.role == "residual" for site in left):
        remedy = "set network.kind: locon"
    else:
        remedy = (
            "train them too (network.layers, optimizer.block_rates), or name the base that the "
            "file is for"
        )
    raise WeightsError(
        f"network.initial has {len(left)} layers that this job does not train, "
        f"{some_of([site.name for site in left], _NAMED)}. So that nothing of it is lost, {remedy};"
        " or start from another file."
    )


def _refuse_other_kinds(modules: Mapping[str, AdapterModule], options: NetworkOptions) -> None:
    low_rank = get_network(options.kind).low_rank
    for name, module in modules.items():
        of_file = network_of(module)
        if isinstance(options, LycorisOptions) and of_file == options.kind:
            algo = "norms" if module.kind == "norm" else module.kind
            if algo != options.algo:
                raise WeightsError(
                    f"network.initial has {algo} at {name}, and network.algo is {options.algo}. "
                    f"Set network.algo: {algo}."
                )
        if of_file == options.kind or (low_rank and of_file == "lora"):
            continue
        raise WeightsError(
            f"network.initial has {of_file} at {name}, and network.kind is {options.kind}: one "
            f"cannot become the other without loss. Set network.kind: {of_file}, or merge the file "
            "into the base (family.loras) and start fresh."
        )


def _refuse_other_ranks(
    sites: Sequence[Site], held: Mapping[str, AdapterModule | None], options: NetworkOptions
) -> None:
    wrong = [
        f"{site.name} (rank {module.rank}, the job's is {options.rank_at(site)})"
        for site in sites
        if (module := held[site.name]) is not None
        and module.rank
        and module.rank != options.rank_at(site)
    ]
    if wrong:
        raise WeightsError(
            f"network.initial has other ranks than this job at {len(wrong)} layers: "
            f"{some_of(wrong, _NAMED)}. Set network.initial_ranks: true in place of network.rank "
            "to take the file's, or set network.rank to them."
        )


def _refuse_other_form(module: AdapterModule, site: Site, options: NetworkOptions) -> None:
    """What the job says of factors, axes and the like is what the file has."""
    network = get_network(options.kind)
    if network.low_rank:
        return
    found = {word: array.shape for word, array in parameters_of(module, site).items()}
    if isinstance(options, DoraOptions):
        wanted = (site.outputs, 1) if options.axis == "output" else (1, site.inputs)
        same = found.get(DORA, wanted) == wanted
    else:
        fresh = network.initial(options, site, np.zeros, _no_weight)
        same = found == {word: array.shape for word, array in fresh.items()}
    if not same:
        told = ", ".join(f"{word} {shape}" for word, shape in sorted(found.items()))
        raise WeightsError(
            f"network.initial has another form of {options.kind} than this job at {site.name}: "
            f"{told}. Leave out the network's options and set network.initial_ranks: true, or set "
            "them to the file's."
        )


def _no_weight() -> NDArray[np.float64]:
    raise AssertionError("kinds that begin from the frozen weight are told apart otherwise")
