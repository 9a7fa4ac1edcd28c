"""Which parameters share a rate, and what the rate of each group is at a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from raylora.base.errors import OptionError
from raylora.base.site import Site
from raylora.base.site_match import first_match, matches, nearest
from raylora.optim.block_rates import BlockRates, block_weights
from raylora.optim.options import OptimizerOptions, Part


@dataclass(frozen=True)
class Group:
    """Parameters with one rate.

    Attributes:
        name: as sd-scripts tells it: "textencoder", "textencoder 2", "unet plus", "unet_block7",
            "unet reg_lr_0" for the first glob of `optimizer.rates`, …
        part: the model that they are in.
        rate: peak rate, 0 or more.
        sign: -1 where the rate was negative: the gradient is to be turned around.
        members: (site name, parameter name) each, in the order of the sites.
    """

    name: str
    part: Part
    rate: float
    sign: int
    members: tuple[tuple[str, str], ...]


def part_of(site: Site) -> Part:
    """The model that a site is in, as rates tell them apart."""
    return "text_encoder" if site.component.startswith("text_encoder") else "denoiser"


def trained_sites(
    options: OptimizerOptions,
    sites: Sequence[Site],
    counts: tuple[int, int, int],
    *,
    ends: bool = False,
) -> list[Site]:
    """The sites whose rate is not 0; the others get no adapter.

    Args:
        sites: those that `network` chooses.
        counts, ends: the family's blocks; see `block_weights`.

    Raises:
        OptionError: none is left, or a rate is for layers that carry no adapter.
    """
    if not sites:
        raise OptionError(
            "No layer is left to train: the network sits on none of those that network.layers "
            "chooses. Choose others."
        )
    _check_text_rates(options, sites)
    _check_globs(options, sites)
    weights = block_weights(options.block_rates, counts, ends=ends)
    _check_blocks(options.block_rates, sites, counts, ends=ends)
    kept = [site for site in sites if _rate(options, site, weights) != 0]
    if not kept:
        zero = (
            "text_encoder_rate, block_rates and rates"
            if options.rates
            else ("text_encoder_rate and block_rates")
        )
        raise OptionError(
            f"No layer is left to train: optimizer.denoiser_rate, {zero} are 0 for each that "
            "network.train and network.layers choose."
        )
    return kept


def _check_text_rates(options: OptimizerOptions, sites: Sequence[Site]) -> None:
    """A list of rates has one for each text encoder that is trained, and none for the others."""
    rates = options.text_rates
    if len(rates) == 1:
        return
    trained = {_encoder(site): site.component for site in sites if part_of(site) == "text_encoder"}
    for number, component in sorted(trained.items()):
        if number >= len(rates):
            raise OptionError(
                f"optimizer.text_encoder_rate has {len(rates)} numbers, and {component} is trained "
                "too. Give one for each text encoder of the base, or one number for all."
            )
    for number, rate in enumerate(rates):
        if rate and trained and number not in trained:
            raise OptionError(
                f"optimizer.text_encoder_rate has {rate:g} for text encoder {number + 1}, which "
                "carries no adapter (network.text_encoders and network.layers choose). Write 0 "
                "there, or have it trained."
            )


def _check_globs(options: OptimizerOptions, sites: Sequence[Site]) -> None:
    """Each of `optimizer.rates` is the first to fit some layer."""
    used = {first_match(options.rates, site) for site in sites}
    for pattern in options.rates:
        if pattern in used:
            continue
        if any(matches(pattern, site) for site in sites):
            raise OptionError(
                f"optimizer.rates: {pattern!r} has no effect: others before it fit all of its "
                "layers. Put it before them, or leave it out."
            )
        raise OptionError(
            f"optimizer.rates: {pattern!r} means no layer that carries the adapter."
            f"{nearest(pattern, sites)}"
        )


def _check_blocks(
    rates: BlockRates, sites: Sequence[Site], counts: tuple[int, int, int], *, ends: bool
) -> None:
    """What is given for blocks is for some that carry the adapter; 1 may always be written out."""
    weights = block_weights(rates, counts, ends=ends)
    blocks = {site.block for site in sites if site.block is not None}
    for word in (*rates.written, "zero_threshold"):
        usual = BlockRates.model_fields[word].default
        without = block_weights(rates.model_copy(update={word: usual}), counts, ends=ends)
        changed = {block for block, old in enumerate(without) if old != weights[block]}
        if changed and not changed & blocks:
            raise OptionError(
                f"optimizer.block_rates.{word} is for blocks that carry no adapter (network.layers "
                "and network.blocks choose). Leave it out, or have them trained."
            )


def make_groups(
    options: OptimizerOptions,
    sites: Sequence[Site],
    words_of: Callable[[Site], Sequence[str]],
    images_per_step: int,
    counts: tuple[int, int, int],
    *,
    fast: Collection[str],
    ends: bool = False,
) -> list[Group]:
    """The groups of the optimizer: by model, by block or layer with a rate of its own, by LoRA+.

    Args:
        sites: as `trained_sites` leaves them.
        words_of: names of a site's trained parameters, e.g. ("down", "up").
        fast: the parameters that LoRA+ moves faster, those that start at zero: `Network.fast`.

    Raises:
        OptionError: LoRA+ is asked for, and the network has nothing to move faster, or nothing
            else.
    """
    weights = block_weights(options.block_rates, counts, ends=ends)
    scale = {"none": 1.0, "linear": float(images_per_step), "sqrt": math.sqrt(images_per_step)}
    rates: dict[str, tuple[Part, float]] = {}
    members: dict[str, list[tuple[str, str]]] = {}
    # sd-scripts' order: the text encoder first, blocks as their layers come.
    for site in sorted(sites, key=lambda site: part_of(site) == "denoiser"):
        part = part_of(site)
        rate = _rate(options, site, weights) * scale[options.scale_rate]
        ratio = options.plus_ratio(part)
        name = _group_name(options, site)
        for group, speed in ((name, 1.0), (f"{name} plus", ratio)):
            if speed is not None:
                rates[group] = (part, rate * speed)
                members.setdefault(group, [])
        for word in words_of(site):
            faster = ratio is not None and word in fast
            members[f"{name} plus" if faster else name].append((site.name, word))
    _check_plus(members)
    return [
        Group(name, part, abs(rate), -1 if rate < 0 else 1, tuple(members[name]))
        for name, (part, rate) in rates.items()
        if members[name]
    ]


def _check_plus(members: Mapping[str, Sequence[object]]) -> None:
    """LoRA+ has both slow and fast parameters, in each part that has a ratio."""
    for part in ("textencoder", "unet"):
        held = {name: len(some) for name, some in members.items() if name.startswith(part)}
        fast = sum(many for name, many in held.items() if name.endswith(" plus"))
        if not any(name.endswith(" plus") for name in held):
            continue
        if not fast:
            raise OptionError(
                "optimizer.lora_plus_ratio moves one of two halves faster, and this network has no "
                "such halves. Leave it out, or choose network.kind: lora."
            )
        if fast == sum(held.values()):
            raise OptionError(
                "optimizer.lora_plus_ratio moves `up` faster than `down`, and `down` is frozen. "
                "Leave it out and raise the rate instead, or have `down` trained."
            )


def text_stop_step(options: OptimizerOptions, total_steps: int) -> int | None:
    """The first global step in which the text encoder is left as it is; None is never."""
    if options.text_encoder_stop is None:
        return None
    return math.ceil(options.text_encoder_stop * total_steps)


def leave_out(optimizer: torch.optim.Optimizer, groups: Sequence[Group], part: Part) -> None:
    """Let the optimizer's next step pass over a part: without a gradient nothing of it moves.

    A rate of 0 would not do for all: the schedule-free ones go on averaging.

    Args:
        optimizer: from `make_optimizer` over the tensors of `groups`, in their order.
    """
    for held, group in zip(optimizer.param_groups, groups, strict=True):
        if group.part == part:
            for parameter in held["params"]:
                parameter.grad = None


def rates_at(
    groups: Sequence[Group],
    factor: Callable[[int], float],
    step: int,
    total_steps: int,
    options: OptimizerOptions,
) -> list[float]:
    """The rate of each group in a global step, counted from 0.

    Args:
        factor: from `make_schedule`.
    """
    stop = text_stop_step(options, total_steps)
    stopped = stop is not None and step >= stop
    now = factor(step)
    return [
        0.0 if stopped and group.part == "text_encoder" else group.rate * now for group in groups
    ]


def _group_name(options: OptimizerOptions, site: Site) -> str:
    name = "unet"
    if part_of(site) == "text_encoder":
        name = f"textencoder {_encoder(site) + 1}" if len(options.text_rates) > 1 else "textencoder"
    elif options.block_rates.given and site.block is not None:
        name = f"unet_block{site.block}"
    pattern = first_match(options.rates, site)
    return name if pattern is None else f"{name} reg_lr_{list(options.rates).index(pattern)}"


def _encoder(site: Site) -> int:
    """Which text encoder it is in, counted from 0: text_encoder, text_encoder_2, …"""
    return int(site.component.rpartition("_")[2]) - 1 if site.component[-1].isdecimal() else 0


def _rate(options: OptimizerOptions, site: Site, weights: Sequence[float]) -> float:
    part = part_of(site)
    rates = options.rates_of(part)
    rate = rates[_encoder(site)] if len(rates) > 1 else rates[0]
    if part == "denoiser" and site.block is not None and options.block_rates.given:
        rate *= weights[site.block]
    pattern = first_match(options.rates, site)
    return rate if pattern is None else rate * options.rates[pattern]
