"""Which layers carry the adapter: what the job's words mean for the layers of a base.

Layers are told apart by what they do, by their place, and by their names, which are those of
diffusers (`Site`). Nothing here knows a model family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from raylora.base.errors import OptionError
from raylora.base.layer_options import (
    PRESETS,
    LayerOptions,
    Lists,
    Said,
    is_large,
    lists_by_block,
    selected,
)
from raylora.base.lookup import did_you_mean, some_of
from raylora.base.site import Site
from raylora.base.site_match import matches, nearest

_USUAL = frozenset({"attention", "mlp", "projection", "modulation"})
_LINEAR: Mapping[str, frozenset[str]] = {
    "usual": _USUAL,
    "attention": frozenset({"attention"}),
    "attention_mlp": frozenset({"attention", "mlp"}),
    "all_linear": _USUAL | {"residual", "embedder"},
}
"""Roles whose linear layers and 1x1 convolutions a preset chooses."""
_NAMED = 3  # layers or numbers that a message names


def chosen_sites(
    options: LayerOptions,
    sites: Sequence[Site],
    *,
    convolutions: bool,
    blocks: tuple[int, int, int],
    ends: bool = False,
) -> list[Site]:
    """The layers that carry the adapter, in the order of the model.

    Normalisations are among them where the choice means them; a network that is not for them
    leaves them.

    Args:
        sites: every layer of the models that `network.train` names.
        convolutions: the network is also for the residual blocks.
        blocks, ends: the family's counts, as its lists by block have them.

    Raises:
        OptionError: something of the choice means no layer, changes nothing, or leaves none.
    """
    sites = _of_encoders(options.text_encoders, sites)
    if convolutions:
        _check_residual(sites)
    for option, lists in lists_by_block(options).items():
        _check_lengths(option, lists, sites, blocks, ends=ends)
    found = _by_layers(options.layers, sites, convolutions=convolutions)
    found = _in_blocks(options.blocks, found, sites)
    kept = [site for site in found if options.own_rank(site) != 0]
    _check_said(options, "ranks", found, sites, options.rank_said)
    _check_said(options, "alphas", kept, sites, options.alpha_said)
    _check_alphas(options, kept)
    if not kept:
        raise OptionError(
            "No layer is left to train: network.layers, network.blocks and ranks of 0 leave out "
            "all of them. Leave fewer out."
        )
    return kept


def _is_text(site: Site) -> bool:
    return site.component.startswith("text_encoder")


# -- text encoders


def _of_encoders(wanted: Sequence[str] | None, sites: Sequence[Site]) -> list[Site]:
    """All but the layers of text encoders that are not to be trained."""
    words = _encoder_words(sites)
    if wanted is None:
        chosen = {component for component in words if not _is_t5(component, sites)}
        return [site for site in sites if not _is_text(site) or site.component in chosen]
    if not words:
        raise OptionError(
            f"network.text_encoders is {', '.join(wanted)}, and network.train leaves the text "
            "encoders out. Leave it out, or set network.train: both."
        )
    if len(words) == 1:
        raise OptionError(
            f"network.text_encoders is {', '.join(wanted)}, and this base has one text encoder "
            "alone. Leave it out."
        )
    known = {name: component for component, word in words.items() for name in (component, word)}
    for name in wanted:
        if name not in known:
            held = [f"{word} ({component})" for component, word in words.items()]
            raise OptionError(
                f"network.text_encoders: this base has no {name}. It has {', '.join(held)}."
            )
    chosen = {known[name] for name in wanted}
    if len(chosen) < len(wanted):
        raise OptionError(
            f"network.text_encoders is {', '.join(wanted)}, which names one of them by two words. "
            "Leave one out."
        )
    return [site for site in sites if not _is_text(site) or site.component in chosen]


def _encoder_words(sites: Sequence[Site]) -> dict[str, str]:
    """Component -> short word of the text encoders, in their order: CLIPs are L, then G."""
    components = dict.fromkeys(site.component for site in sites if _is_text(site))
    clips = iter(("clip_l", "clip_g"))
    return {one: "t5" if _is_t5(one, sites) else next(clips) for one in components}


def _is_t5(component: str, sites: Sequence[Site]) -> bool:
    """CLIP's layers have the level `text_model` in their names, and T5's have not."""
    return not any(site.name.startswith(f"{component}.text_model.") for site in sites)


# -- layers


def _by_layers(
    layers: str | tuple[str, ...], sites: Sequence[Site], *, convolutions: bool
) -> list[Site]:
    """What `network.layers` means."""
    words = (layers,) if isinstance(layers, str) else layers
    wanted = [word for word in words if not word.startswith("!")] or ["usual"]
    unwanted = [word[1:] for word in words if word.startswith("!")]

    def means(word: str, site: Site) -> bool:
        if word in PRESETS:
            return _in_preset(word, site, convolutions=convolutions)
        return matches(word, site)

    for word in (*wanted, *unwanted):
        if not any(means(word, site) for site in sites):
            raise OptionError(
                f"network.layers: {word!r} means no layer of what is trained.{nearest(word, sites)}"
            )
    found = [site for site in sites if any(means(word, site) for word in wanted)]
    for word in unwanted:
        if not any(means(word, site) for site in found):
            raise OptionError(
                f"network.layers: '!{word}' leaves nothing out, as nothing else there chooses such "
                "layers. Leave it out."
            )
    return [site for site in found if not any(means(word, site) for word in unwanted)]


def _in_preset(preset: str, site: Site, *, convolutions: bool) -> bool:
    if site.kind == "norm":
        return preset == "all" or (preset == "usual" and site.section != "")
    if preset == "all" or (convolutions and site.role == "residual"):
        return True
    return site.role in _LINEAR[preset] and not is_large(site)


def _check_residual(sites: Sequence[Site]) -> None:
    inner = [site for site in sites if not _is_text(site)]
    if inner and not any(site.role == "residual" for site in inner):
        raise OptionError(
            "network: it is also for the convolutions of residual blocks, and this base has none. "
            "Choose network.kind: lora in locon's place; other networks do without their options "
            "for convolutions."
        )


# -- blocks


def _in_blocks(
    blocks: Mapping[str, str], found: Sequence[Site], sites: Sequence[Site]
) -> list[Site]:
    """Those in the selected blocks, and those that no selection is about."""
    sections = _sections(sites)
    chosen: dict[str, frozenset[int]] = {}
    for section, written in blocks.items():
        if section not in sections:
            raise OptionError(
                f"network.blocks.{section}: what is trained has no such blocks."
                f"{did_you_mean(section, sections)}"
            )
        last = max(sections[section])
        numbers = selected(section, written)
        chosen[section] = sections[section] if numbers is None else numbers
        if beyond := sorted(chosen[section] - sections[section]):
            raise OptionError(
                f"network.blocks.{section} names {some_of([str(n) for n in beyond], _NAMED)}, and "
                f"its blocks are 0 to {last}."
            )
    kept = [site for site in found if site.number in chosen.get(site.section, {site.number})]
    if blocks and len(kept) == len(found):
        raise OptionError(
            "network.blocks leaves none of the layers out that network.layers chooses. Name fewer "
            "blocks, or leave it out."
        )
    return kept


def _sections(sites: Iterable[Site]) -> dict[str, frozenset[int]]:
    """Stretches with their blocks' numbers; a norm behind the last block is no block of its own."""
    held: dict[str, set[int]] = {}
    for site in sites:
        if site.section and site.kind != "norm":
            held.setdefault(site.section, set()).add(site.number)
    return {section: frozenset(numbers) for section, numbers in held.items()}


# -- ranks and alphas


def _check_lengths(
    option: str,
    lists: Lists,
    sites: Sequence[Site],
    blocks: tuple[int, int, int],
    *,
    ends: bool,
) -> None:
    down, mid, up = blocks
    if isinstance(lists, tuple):
        wanted = down + mid + up + 2 * ends
        if len(lists) != wanted:
            raise OptionError(
                f"network.{option} has {len(lists)} numbers, and this base has {wanted} blocks "
                f"({_told(blocks, ends=ends)}). Give one number for each."
            )
        return
    if mid:
        raise OptionError(
            f"network.{option}: the blocks of a UNet are counted through. Give one list of "
            f"{down + mid + up + 2 * ends} numbers ({_told(blocks, ends=ends)})."
        )
    sections = _sections(site for site in sites if site.block is not None)
    for section, held in lists.items():
        if section not in sections:
            raise OptionError(
                f"network.{option}.{section}: what is trained has no such blocks."
                f"{did_you_mean(section, sections)}"
            )
        if len(held) != len(sections[section]):
            raise OptionError(
                f"network.{option}.{section} has {len(held)} numbers, and there are "
                f"{len(sections[section])} such blocks. Give one number for each."
            )


def _told(blocks: tuple[int, int, int], *, ends: bool) -> str:
    """How the blocks are counted, for a message."""
    down, mid, up = blocks
    if mid:
        inner = f"{down} down, {mid} mid, {up} up"
        return f"1 before them, {inner}, 1 behind them" if ends else inner
    return f"{down} double, {up} single" if up else f"{down} joint"


def _check_said(
    options: LayerOptions,
    what: Literal["ranks", "alphas"],
    chosen: Sequence[Site],
    sites: Sequence[Site],
    said_of: Callable[[Site], Said | None],
) -> None:
    """Whatever is said of ranks or of alphas is said of a layer that is chosen."""
    used = {said.option for site in chosen if (said := said_of(site)) is not None}
    patterns = options.ranks if what == "ranks" else options.alphas
    for pattern in patterns:
        if f"{what}.{pattern}" in used:
            continue
        option = f"network.{what}: {pattern!r}"
        if not any(matches(pattern, site) for site in sites):
            raise OptionError(f"{option} means no layer.{nearest(pattern, sites)}")
        if any(matches(pattern, site) for site in chosen):
            raise OptionError(
                f"{option} has no effect: others before it fit all of its layers. Put it before "
                "them, or leave it out."
            )
        raise OptionError(
            f"{option} means layers that carry no adapter. Add them to network.layers, or leave it "
            "out."
        )
    for option in lists_by_block(options):
        if option.endswith(what) and option not in used:
            raise OptionError(_unused_list(option, what, chosen))


def _unused_list(option: str, what: str, chosen: Sequence[Site]) -> str:
    if option.startswith("conv_") and not any(is_large(site) for site in chosen):
        return (
            f"network.{option} is for convolutions larger than 1x1, and none carries the adapter. "
            "Choose network.kind: locon or network.layers: all, or leave it out."
        )
    if not any(site.block is not None for site in chosen):
        return (
            f"network.{option} is for the blocks of the denoiser, and none of them carries the "
            "adapter. Leave it out."
        )
    return (
        f"network.{option} has no effect: network.{what} says it for all of these layers, or they "
        "carry no adapter. Leave one of them out."
    )


def _check_alphas(options: LayerOptions, kept: Sequence[Site]) -> None:
    """An alpha of 0 is for blocks that are left out."""
    for site in kept:
        said = options.alpha_said(site)
        if said is not None and not said.value:
            raise OptionError(
                f"network.{said.option} is 0 for block {site.block}, whose adapter would do "
                "nothing. Give it a number above 0, or rank 0 to leave the block out."
            )
