"""Options of the layers that carry the adapter, and of their ranks and alphas.

What they mean for a base is in `base/layers.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from raylora.base.lookup import did_you_mean
from raylora.base.options import Options, known_as
from raylora.base.site import Site
from raylora.base.site_match import first_match

Preset = Literal["usual", "attention", "attention_mlp", "all_linear", "all"]
Encoder = Literal["clip_l", "clip_g", "t5", "text_encoder", "text_encoder_2", "text_encoder_3"]

_DIMS = (
    *("img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim"),
    *("single_dim", "single_mod_dim"),
    *("context_attn_dim", "context_mlp_dim", "context_mod_dim"),
    *("x_attn_dim", "x_mlp_dim", "x_mod_dim"),
)
PRESETS: tuple[str, ...] = get_args(Preset)
"""What `network.layers` may be in one word."""


def _numbers(written: Any) -> Any:
    """`2,4,8` as a list, alone and by section."""
    if isinstance(written, str):
        return written.split(",")
    if isinstance(written, dict):
        return {section: _numbers(held) for section, held in written.items()}
    return written


def _texts(written: Any) -> Any:
    """Numbers of blocks as text, however they are written."""
    if not isinstance(written, dict):
        return written
    told = {}
    for section, held in written.items():
        several = held if isinstance(held, list | tuple) else [held]
        whole = all(isinstance(one, int) and not isinstance(one, bool) for one in several)
        told[section] = ",".join(map(str, several)) if whole else held
    return told


Rank = Annotated[int, Field(ge=0, le=4096)]
Alpha = Annotated[float, Field(ge=0)]
RankList = Annotated[
    tuple[Rank, ...] | dict[str, tuple[Rank, ...]] | None, BeforeValidator(_numbers)
]
AlphaList = Annotated[
    tuple[Alpha, ...] | dict[str, tuple[Alpha, ...]] | None, BeforeValidator(_numbers)
]
Selections = Annotated[dict[str, str], BeforeValidator(_texts)]
Lists = tuple[float, ...] | Mapping[str, tuple[float, ...]]
"""Numbers by block, counted through or by stretch of the model."""


class Said(NamedTuple):
    """A number, and the option that says it."""

    option: str
    value: float


class LayerOptions(Options):
    """Which layers carry the adapter, and which of them have a rank or an alpha of their own."""

    layers: Preset | tuple[str, ...] = Field(
        "usual",
        json_schema_extra=known_as(
            sd_scripts="usual is what it trains; --network_args in_dims, --network_args emb_dims: "
            "a list with embedder, and ranks",
            guides="target modules, LyCORIS preset (attn-only is attention, attn-mlp is "
            "attention_mlp)",
        )
        | {"examples": ["attention", ["usual", "!*.attn2.*"], ["*.attn1.*", "mlp"]]},
    )
    """Which layers carry the adapter. usual: every linear layer and 1x1 convolution of the
    transformer blocks, the one to start with. attention: q, k, v and out alone. attention_mlp:
    these and the feed-forward layers. all_linear: every linear layer and 1x1 convolution of the
    model, also those that read time, text and pixels. all: every convolution too. Networks for
    convolutions (locon) add the residual blocks to each of these. Or a list of globs over the
    layers' names as diffusers has them, e.g. `["*.attn1.*", "*.ff.*"]`, of such words, of what
    layers do (attention, mlp, projection, modulation, residual, embedder, norm) and of stretches of
    the model (down, mid, up; double, single; joint; text); what begins with `!` is left out, from
    the usual ones where nothing else is named: `["!*.attn2.*"]`."""
    blocks: Selections = Field(
        {},
        json_schema_extra=known_as(
            sd_scripts="--network_args train_blocks (single is {double: none}), "
            "--network_args train_double_block_indices, "
            "--network_args train_single_block_indices, --network_args train_block_indices",
            guides="target blocks",
        )
        | {"examples": [{"double": "0-7,12", "single": "none"}]},
    )
    """Which blocks of a stretch carry the adapter, by their numbers in diffusers' names: numbers
    and ranges from 0 on, `all` or `none`. FLUX has double and single, e.g. `{double: "0-7,12",
    single: none}`; SD 3 joint: `{joint: "0-11"}`; UNets down, mid and up by resolution: `{down:
    "1,2", up: "0-1"}`; text encoders text. A stretch that is not named stays whole, and so do the
    layers outside of blocks."""
    ranks: dict[str, Rank] = Field(
        {},
        json_schema_extra=known_as(
            sd_scripts="--network_args network_reg_dims (regular expressions over its own names); "
            + ", ".join(f"--network_args {word}" for word in _DIMS),
        )
        | {"examples": [{"modulation": 4, "*add*": 0, "*_context.*": 0, "single": 8}]},
    )
    """Ranks of some of the chosen layers: glob over names, what layers do, or stretch of the model
    -> rank, e.g. `{modulation: 4, "*.ff.*": 8, single: 16}`. The first that fits a layer counts,
    0 leaves it out, and layers that nothing fits have `rank`. In the double blocks of FLUX and the
    joint ones of SD 3, `*add*` is the text's attention and `*_context.*` its MLP and modulation;
    what is left is the picture's: `{"*add*": 0, "*_context.*": 0}` trains that alone."""
    alphas: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        json_schema_extra=known_as(sd_scripts="none (--network_alpha is for all layers)")
        | {"examples": [{"attention": 8, "*.ff.*": 16}]},
    )
    """The same for alpha, e.g. `{attention: 8, "*.ff.*": 16}`. Layers that nothing fits have
    `alpha`, whatever their rank."""
    block_ranks: RankList = Field(
        None,
        json_schema_extra=known_as(sd_scripts="--network_args block_dims", guides="block dims")
        | {"examples": ["0,0,0,0,4,4,4,4,8,8,8,8,8,8,8,8,8,4,4,4,4,0,0,0,0", {"joint": [8] * 24}]},
    )
    """Rank of linear layers and 1x1 convolutions by block of the denoiser: one number a block, as a
    list or as text (`2,4,...`); 0 leaves a block out. SD 1.x and 2.x: 25 numbers (12 down, 1 mid,
    12 up; the first is never used). SDXL: 23 (time and size, 9 down, 3 mid, 9 up, end). FLUX and SD
    3: one a block, those of FLUX's single blocks behind its double ones, or by stretch: `{double:
    [...], single: [...]}`. Stretches that are not named, text encoders and layers outside of blocks
    have `rank`."""
    block_alphas: AlphaList = Field(
        None,
        json_schema_extra=known_as(sd_scripts="--network_args block_alphas")
        | {"examples": [{"double": [8] * 19}]},
    )
    """The same for alpha; without it all blocks have `alpha`, whatever their rank."""
    conv_block_ranks: RankList = Field(
        None,
        json_schema_extra=known_as(
            sd_scripts="--network_args conv_block_dims", guides="conv block dims"
        )
        | {"examples": ["0,0,0,0,4,4,4,4,8,8,8,8,8,8,8,8,8,4,4,4,4,0,0,0,0"]},
    )
    """Rank of convolutions larger than 1x1 by block, written as `block_ranks`, for networks that
    sit on them; 0 leaves a block's convolutions out."""
    conv_block_alphas: AlphaList = Field(
        None,
        json_schema_extra=known_as(sd_scripts="--network_args conv_block_alphas")
        | {"examples": ["0,0,0,0,2,2,2,2,4,4,4,4,4,4,4,4,4,2,2,2,2,0,0,0,0"]},
    )
    """The same for alpha."""
    text_encoders: tuple[Encoder, ...] | None = Field(
        None,
        min_length=1,
        json_schema_extra=known_as(
            sd_scripts="--network_args train_t5xxl; a --text_encoder_lr of 0 leaves one out",
            guides="train T5",
        )
        | {"examples": [["clip_l"], ["clip_l", "clip_g", "t5"]]},
    )
    """Which text encoders carry the adapter where `train` says that they do: clip_l, clip_g, t5, or
    their names as diffusers has them (text_encoder, text_encoder_2, ...). Null: every CLIP, and
    not T5, whose layers few programs read from LoRA files."""

    @field_validator("blocks")
    @classmethod
    def _are_numbers(cls, blocks: dict[str, str]) -> dict[str, str]:
        for section, written in blocks.items():
            selected(section, written)
        return blocks

    @field_validator("layers", mode="before")
    @classmethod
    def _is_a_preset_or_a_list(cls, layers: Any) -> Any:
        if not isinstance(layers, str) or layers in PRESETS:
            return layers
        if "." in layers or "*" in layers or layers.startswith("!"):
            raise ValueError(f"{layers!r} is no preset. Globs stand in a list: [{layers!r}].")
        raise ValueError(f"{layers!r} is no preset.{did_you_mean(layers, PRESETS)}")

    @field_validator("layers")
    @classmethod
    def _are_words(cls, layers: Preset | tuple[str, ...]) -> Preset | tuple[str, ...]:
        if not layers or any(not word.removeprefix("!") for word in layers):
            raise ValueError("it has no word, or an empty one. Give a glob or a preset.")
        twice = sorted({word for word in layers if layers.count(word) > 1})
        if twice and not isinstance(layers, str):
            raise ValueError(f"{twice[0]!r} is there twice. Leave one out.")
        return layers

    @model_validator(mode="after")
    def _name_encoders_once(self) -> Self:
        named = self.text_encoders or ()
        if len(set(named)) < len(named):
            raise ValueError("network.text_encoders names one twice. Leave one of them out.")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """Its fields that say other than what goes without saying, by name."""
        held = {word: getattr(self, word) for word in LayerOptions.model_fields}
        return {
            word: value
            for word, value in held.items()
            if value != LayerOptions.model_fields[word].default
        }

    def rank_said(self, site: Site) -> Said | None:
        """The rank that a layer has of its own, 0 where it is left out."""
        if (pattern := first_match(self.ranks, site)) is not None:
            return Said(f"ranks.{pattern}", self.ranks[pattern])
        if is_large(site):
            return _by_block("conv_block_ranks", self.conv_block_ranks, site)
        return _by_block("block_ranks", self.block_ranks, site)

    def alpha_said(self, site: Site) -> Said | None:
        """The alpha that a layer has of its own."""
        if (pattern := first_match(self.alphas, site)) is not None:
            return Said(f"alphas.{pattern}", self.alphas[pattern])
        if is_large(site):
            return _by_block("conv_block_alphas", self.conv_block_alphas, site)
        return _by_block("block_alphas", self.block_alphas, site)

    def own_rank(self, site: Site) -> int | None:
        """The rank that these options give a layer; None where it has the network's."""
        said = self.rank_said(site)
        return None if said is None else int(said.value)

    def own_alpha(self, site: Site) -> float | None:
        """The alpha that these options give a layer; None where it has the network's."""
        said = self.alpha_said(site)
        return None if said is None else said.value


def is_large(site: Site) -> bool:
    """A convolution larger than 1x1."""
    return site.kind == "conv" and site.kernel != (1, 1)


def selected(section: str, written: str) -> frozenset[int] | None:
    """Numbers of the blocks that `network.blocks` names of a stretch; None is all of them.

    Raises:
        ValueError: it is written otherwise.
    """
    if written.strip() in ("all", "none"):
        return None if written.strip() == "all" else frozenset()
    numbers: set[int] = set()
    for piece in written.split(","):
        first, dash, last = (word.strip() for word in piece.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(
                f"network.blocks.{section} is {written!r}. Write numbers and ranges, e.g. "
                '"0-7,12", all, or none.'
            )
        if dash and int(last) < int(first):
            raise ValueError(
                f"network.blocks.{section} is {written!r}: {piece.strip()} goes down. Write "
                f"{last}-{first}."
            )
        numbers |= set(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def lists_by_block(options: LayerOptions) -> dict[str, Lists]:
    """What is given by block."""
    held: dict[str, Lists | None] = {
        "block_ranks": options.block_ranks,
        "block_alphas": options.block_alphas,
        "conv_block_ranks": options.conv_block_ranks,
        "conv_block_alphas": options.conv_block_alphas,
    }
    return {option: lists for option, lists in held.items() if lists is not None}


def _by_block(option: str, lists: Lists | None, site: Site) -> Said | None:
    """A block's number of a list; None for layers that no list is about."""
    if lists is None or site.block is None:
        return None
    if isinstance(lists, tuple):
        held, number = lists, site.block
    else:
        held, number = lists.get(site.section, ()), site.number
    return Said(option, held[number]) if number < len(held) else None


def encoder_problems(options: LayerOptions, *, trains_text: bool) -> Iterator[str]:
    """What is said of text encoders that carry no adapter, a sentence each."""
    if options.text_encoders is not None and not trains_text:
        yield (
            f"network.text_encoders is {', '.join(options.text_encoders)}, and network.train "
            "leaves the text encoders out. Leave it out, or set network.train: both."
        )
