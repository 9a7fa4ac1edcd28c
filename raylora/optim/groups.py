"""Which parameters share a rate, and what the rate of each group is at a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from raylora.base.errors import OptionError
from raylora.base.site import Site
from raylora.optim.block_rates import block_weights
from raylora.optim.options import OptimizerOptions, Part

SD1_BLOCKS = (12, 1, 12)
"""Blocks down, in the middle and up of SD 1.x, as sd-scripts counts them."""
FAST_WORD = "up"
"""The parameter that LoRA+ moves faster: the one that starts at zero."""


@dataclass(frozen=True)
class Group:
    """Parameters with one rate.

    Attributes:
        name: as sd-scripts tells it: "textencoder", "unet plus", "unet_block7", …
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
    counts: tuple[int, int, int] = SD1_BLOCKS,
    *,
    ends: bool = False,
) -> list[Site]:
    """The sites whose rate is not 0; the others get no adapter.

    Args:
        counts, ends: the family's blocks; see `block_weights`.

    Raises:
        OptionError: none is left.
    """
    weights = block_weights(options.block_rates, counts, ends=ends)
    kept = [site for site in sites if _rate(options, site, weights) != 0]
    if sites and not kept:
        raise OptionError(
            "No layer is left to train: optimizer.denoiser_rate, text_encoder_rate and "
            "block_rates are 0 for each that network.train and network.layers choose."
        )
    return kept


def make_groups(
    options: OptimizerOptions,
    sites: Sequence[Site],
    words_of: Callable[[Site], Sequence[str]],
    images_per_step: int,
    counts: tuple[int, int, int] = SD1_BLOCKS,
    *,
    ends: bool = False,
) -> list[Group]:
    """The groups of the optimizer: by model, by block where blocks have rates, and by LoRA+.

    Args:
        sites: as `trained_sites` leaves them.
        words_of: names of a site's parameters, e.g. ("down", "up").

    Raises:
        OptionError: LoRA+ is asked for, and a network has no `up`.
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
            fast = ratio is not None and word == FAST_WORD
            members[f"{name} plus" if fast else name].append((site.name, word))
    for name, held in members.items():
        if name.endswith(" plus") and not held:
            raise OptionError(
                f"optimizer.lora_plus_ratio moves `{FAST_WORD}` faster, and this network has no "
                "such parameter. Leave it out, or choose network.kind: lora."
            )
    return [
        Group(name, part, abs(rate), -1 if rate < 0 else 1, tuple(members[name]))
        for name, (part, rate) in rates.items()
        if members[name]
    ]


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
    if part_of(site) == "text_encoder":
        return "textencoder"
    if options.block_rates.given and site.block is not None:
        return f"unet_block{site.block}"
    return "unet"


def _rate(options: OptimizerOptions, site: Site, weights: Sequence[float]) -> float:
    part = part_of(site)
    rate = options.rate_of(part)
    if part == "denoiser" and site.block is not None and options.block_rates.given:
        return rate * weights[site.block]
    return rate
