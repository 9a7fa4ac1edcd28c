"""Which layers a job's words choose, and what rank and alpha each has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from true_configs import SD15_UNET, SDXL_UNET, Configured

from raylora.base.errors import OptionError
from raylora.base.layer_options import LayerOptions
from raylora.base.layers import chosen_sites
from raylora.base.options import explain
from raylora.base.site import Role, Site
from raylora.base.site_match import nearest
from raylora.components.dit import dit_sites
from raylora.components.unet import empty_unet, sd_block, unet_sites

Counts = tuple[tuple[int, int, int], bool]
SD1: Counts = ((12, 1, 12), False)
FLUX: Counts = ((3, 0, 2), False)
SD3: Counts = ((2, 0, 0), False)


def layer(name: str, role: Role, section: str = "", number: int = 0, **words: Any) -> Site:
    return Site(
        name,
        words.pop("kind", "linear"),
        4,
        4,
        role=role,
        section=section,
        **words | {"number": number},
    )


def unet() -> list[Site]:
    """Two stretches of an SD 1.x: a block with a transformer each, and what lies around them."""
    three: dict[str, Any] = {"kind": "conv", "kernel": (3, 3), "padding": (1, 1)}
    sites = [layer("unet.conv_in", "embedder", **three), layer("unet.time.linear_1", "embedder")]
    for section, path, block in (("down", "down_blocks.1", 4), ("up", "up_blocks.2", 19)):
        number, place = int(path[-1]), f"unet.{path}"
        inner = f"{place}.attentions.0"
        words: dict[str, Any] = {"section": section, "number": number, "block": block}
        sites += [
            layer(f"{inner}.norm", "norm", kind="norm", **words),
            layer(f"{inner}.proj_in", "projection", kind="conv", **words),
            layer(f"{inner}.attn1.to_q", "attention", **words),
            layer(f"{inner}.attn2.to_q", "attention", **words),
            layer(f"{inner}.ff.net.2", "mlp", **words),
            layer(f"{place}.resnets.0.conv1", "residual", **three, **words),
            layer(f"{place}.resnets.0.time_emb_proj", "residual", **words),
            layer(f"{place}.resnets.0.conv_shortcut", "residual", kind="conv", **words),
        ]
    return [*sites, layer("unet.conv_norm_out", "norm", kind="norm")]


def flux() -> list[Site]:
    """Three double and two single blocks."""
    sites = [layer("transformer.x_embedder", "embedder")]
    for number in range(3):
        place = f"transformer.transformer_blocks.{number}"
        words: dict[str, Any] = {"section": "double", "number": number, "block": number}
        sites += [
            layer(f"{place}.norm1.linear", "modulation", **words),
            layer(f"{place}.attn.norm_q", "norm", kind="norm", **words),
            layer(f"{place}.attn.to_q", "attention", **words),
            layer(f"{place}.attn.add_q_proj", "attention", **words),
            layer(f"{place}.ff.net.2", "mlp", **words),
            layer(f"{place}.ff_context.net.2", "mlp", **words),
        ]
    for number in range(2):
        place = f"transformer.single_transformer_blocks.{number}"
        words = {"section": "single", "number": number, "block": 3 + number}
        sites += [
            layer(f"{place}.norm.linear", "modulation", **words),
            layer(f"{place}.attn.to_q", "attention", **words),
            layer(f"{place}.proj_out", "mlp", **words),
        ]
    return [*sites, layer("transformer.proj_out", "embedder")]


def text(*components: str) -> list[Site]:
    """Two layers of each; T5 is the one that `t5.` marks."""
    found = []
    for component in components:
        t5, name = component.startswith("t5."), component.removeprefix("t5.")
        for number in range(2):
            path = f"encoder.block.{number}.layer.0" if t5 else f"text_model.encoder.{number}"
            words: dict[str, Any] = {"section": "text", "number": number}
            found += [
                layer(f"{name}.{path}.q", "attention", **words),
                layer(f"{name}.{path}.fc1", "mlp", **words),
            ]
        found.append(layer(f"{name}.final_norm", "norm", "text", 2, kind="norm"))
    return found


def chosen(
    sites: list[Site], counts: Counts = SD1, *, convolutions: bool = False, **words: Any
) -> list[Site]:
    blocks, ends = counts
    return chosen_sites(
        LayerOptions(**words), sites, convolutions=convolutions, blocks=blocks, ends=ends
    )


def refusal(sites: list[Site], counts: Counts = SD1, **words: Any) -> str:
    with pytest.raises(OptionError) as caught:
        chosen(sites, counts, **words)
    return str(caught.value)


def roles(sites: list[Site]) -> dict[str, int]:
    """How many layers of each role, those of larger convolutions apart."""
    found: dict[str, int] = {}
    for site in sites:
        word = f"{site.role} 3x3" if site.kernel == (3, 3) else site.role
        found[word] = found.get(word, 0) + 1
    return found


ATTENTION = {"attention": 4}
MLP = {**ATTENTION, "mlp": 2}
USUAL = {**MLP, "projection": 2, "norm": 2}
RESIDUAL = {"residual": 4, "residual 3x3": 2}
ALL = {**USUAL, **RESIDUAL, "embedder": 1, "embedder 3x3": 1, "norm": 3}


@pytest.mark.parametrize(
    ("preset", "plain", "convolved"),
    [
        ("attention", ATTENTION, {**ATTENTION, **RESIDUAL}),
        ("attention_mlp", MLP, {**MLP, **RESIDUAL}),
        ("usual", USUAL, {**USUAL, **RESIDUAL}),
        (
            "all_linear",
            {"embedder": 1, "attention": 4, "mlp": 2, "projection": 2, "residual": 4},
            {"embedder": 1, "attention": 4, "mlp": 2, "projection": 2, **RESIDUAL},
        ),
        ("all", ALL, ALL),
    ],
)
def test_presets_choose_by_what_layers_do(
    preset: str, plain: dict[str, int], convolved: dict[str, int]
):
    assert roles(chosen(unet(), layers=preset)) == plain
    assert roles(chosen(unet(), layers=preset, convolutions=True)) == convolved


def test_the_usual_layers_are_those_of_blocks_and_the_modulation_with_them():
    found = chosen(flux(), FLUX)
    assert roles(found) == {"modulation": 5, "norm": 3, "attention": 8, "mlp": 8}
    assert found == [site for site in flux() if site in found]  # in the order of the model


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["*.attn1.*"], {"attention": 2}),
        (["*.attn1.*", "mlp"], {"attention": 2, "mlp": 2}),
        (
            ["up", "!norm"],
            {"projection": 1, "attention": 2, "mlp": 1, "residual": 2, "residual 3x3": 1},
        ),
        (["!*.attn2.*", "!norm"], {"projection": 2, "attention": 2, "mlp": 2}),
        (["attention_mlp", "unet.conv_in"], {**MLP, "embedder 3x3": 1}),
        (["*.down_blocks.1.*.to_[qk]"], {"attention": 2}),
    ],
)
def test_a_list_chooses_by_globs_words_and_presets(layers: list[str], expected: dict[str, int]):
    assert roles(chosen(unet(), layers=layers)) == expected


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (["*.attn3.*"], "'*.attn3.*' means no layer of what is trained. Did you mean 'attn"),
        (["modulaton"], "Did you mean 'modulation'?"),
        (["joint"], "'joint' means no layer"),
        (["*.resnets.7.*"], "Layers are named like unet."),
        (["attention", "!*.ff.*"], "'!*.ff.*' leaves nothing out"),
        (["!*.attn9.*"], "'*.attn9.*' means no layer"),
        (["attention", "!*"], "No layer is left to train"),
    ],
)
def test_words_that_mean_no_layer_are_refused_with_near_ones(layers: list[str], told: str):
    assert told in refusal(unet(), layers=layers)


BLOCKS: list[tuple[dict[str, Any], set[tuple[str, int]]]] = [
    ({"double": "0,2", "single": "none"}, {("double", 0), ("double", 2)}),
    ({"double": "none"}, {("single", 0), ("single", 1)}),
    ({"double": [1], "single": 1}, {("double", 1), ("single", 1)}),
    ({"double": " 0 - 1 , 2", "single": "none"}, {("double", n) for n in range(3)}),
    ({"double": "all", "single": "1"}, {*(("double", n) for n in range(3)), ("single", 1)}),
]


@pytest.mark.parametrize(("blocks", "expected"), BLOCKS)
def test_blocks_are_chosen_by_stretch_and_number(
    blocks: dict[str, Any], expected: set[tuple[str, int]]
):
    found = chosen(flux(), FLUX, blocks=blocks)
    assert {(site.section, site.number) for site in found} == expected
    whole = chosen(flux(), FLUX)
    assert found == [site for site in whole if (site.section, site.number) in expected]


def test_blocks_say_nothing_of_layers_outside_of_them():
    found = chosen(flux(), FLUX, layers="all_linear", blocks={"double": "none", "single": "none"})
    assert [site.name for site in found] == ["transformer.x_embedder", "transformer.proj_out"]


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        ({"duble": "0"}, "Did you mean 'double'?"),
        ({"down": "0"}, "what is trained has no such blocks. Allowed: double, single."),
        ({"double": "2-4"}, "names 3, 4, and its blocks are 0 to 2"),
        ({"double": "all"}, "leaves none of the layers out"),
        ({"double": "none", "single": "none"}, "No layer is left to train"),
    ],
)
def test_blocks_that_are_not_there_are_refused(blocks: dict[str, str], told: str):
    assert told in refusal(flux(), FLUX, blocks=blocks)


def test_text_encoders_have_blocks_without_the_norm_behind_them():
    sites = text("text_encoder")
    assert {site.number for site in chosen(sites, blocks={"text": "1"})} == {1}
    assert "blocks are 0 to 1" in refusal(sites, blocks={"text": "2"})


def test_the_first_glob_that_fits_gives_the_rank():
    options = LayerOptions(
        ranks={"*.attn.add_*": 0, "attention": 4, "single": 8, "*.0.ff.*": 2}, alphas={"mlp": 3}
    )
    found = chosen_sites(options, flux(), convolutions=False, blocks=FLUX[0])
    assert not any("add_q" in site.name for site in found)
    expected = {
        "transformer.transformer_blocks.0.attn.to_q": 4,
        "transformer.single_transformer_blocks.1.attn.to_q": 4,
        "transformer.single_transformer_blocks.1.proj_out": 8,
        "transformer.transformer_blocks.0.ff.net.2": 2,
        "transformer.transformer_blocks.1.ff.net.2": None,
    }
    by_name = {site.name: site for site in found}
    assert {name: options.own_rank(by_name[name]) for name in expected} == expected
    assert {site.role for site in found if options.own_alpha(site) == 3} == {"mlp"}
    assert {options.own_alpha(site) for site in found if site.role != "mlp"} == {None}


def test_the_picture_stream_can_be_trained_alone():
    found = chosen(flux(), FLUX, ranks={"*add*": 0, "*_context.*": 0}, blocks={"single": "none"})
    paths = {site.name.partition("blocks.")[2][2:] for site in found if site.kind != "norm"}
    assert paths == {"norm1.linear", "attn.to_q", "ff.net.2"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"ranks": {"*.attnn.*": 4}}, "means no layer. Did you mean 'attn'"),
        ({"ranks": {"embedder": 4}}, "means layers that carry no adapter"),
        ({"ranks": {"*": 4, "mlp": 8}}, "'mlp' has no effect: others before it"),
        ({"alphas": {"projecton": 4}}, "network.alphas: 'projecton' means no layer"),
        ({"ranks": {"mlp": 0}, "alphas": {"mlp": 4}}, "means layers that carry no adapter"),
        ({"ranks": {"*": 0}}, "No layer is left to train"),
        (
            {"ranks": {"double": 4, "single": 8}, "block_ranks": [1] * 5},
            "block_ranks has no effect: network.ranks says it for all",
        ),
        ({"conv_block_ranks": [1] * 5}, "is for convolutions larger than 1x1"),
        (
            {"block_ranks": [1] * 6},
            "has 6 numbers, and this base has 5 blocks (3 double, 2 single)",
        ),
        ({"block_ranks": {"double": [1, 2]}}, "has 2 numbers, and there are 3 such blocks"),
        ({"block_ranks": {"joint": [1, 2]}}, "has no such blocks. Allowed: double, single"),
        ({"block_alphas": [0, 1, 1, 1, 1]}, "block_alphas is 0 for block 0, whose adapter"),
        ({"layers": ["embedder"], "block_ranks": [1] * 5}, "none of them carries the adapter"),
    ],
)
def test_ranks_without_effect_are_refused(words: dict[str, Any], told: str):
    assert told in refusal(flux(), FLUX, **words)


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        (SD1, "has 3 numbers, and this base has 25 blocks (12 down, 1 mid, 12 up)"),
        (
            ((9, 3, 9), True),
            "23 blocks (1 before them, 9 down, 3 mid, 9 up, 1 behind them). Give one number",
        ),
    ],
)
def test_a_list_of_another_length_is_refused_with_the_right_one(counts: Counts, told: str):
    assert told in refusal(unet(), counts, block_ranks="1,2,3")
    assert "counted through" in refusal(unet(), counts, block_alphas={"down": [1.0] * 12})


def test_lists_give_each_block_its_rank_and_larger_convolutions_their_own():
    ranks = [0] * 25
    ranks[4], ranks[19] = 8, 2
    convolved = [3] * 25
    convolved[19] = 0
    options = LayerOptions(
        block_ranks=",".join(map(str, ranks)),
        block_alphas=[1.5] * 25,
        conv_block_ranks=convolved,
        conv_block_alphas=[0.5] * 25,
    )
    sites = unet() + text("text_encoder")
    found = chosen_sites(options, sites, convolutions=True, blocks=SD1[0])
    told = {(s.block, s.kernel[0], options.own_rank(s), options.own_alpha(s)) for s in found}
    assert told == {(4, 1, 8, 1.5), (4, 3, 3, 0.5), (19, 1, 2, 1.5), (None, 1, None, None)}
    assert {s.component for s in found if s.block is None} == {"text_encoder"}


@pytest.mark.parametrize(
    "lists", [[1, 2, 3, 4, 5], {"double": [1, 2, 3], "single": "4,5"}, {"single": [4, 5]}]
)
def test_transformers_lists_are_counted_through_or_by_stretch(lists: Any):
    options = LayerOptions(block_ranks=lists)
    found = chosen_sites(options, flux(), convolutions=False, blocks=FLUX[0])
    for site in found:
        expected = None if site.section == "double" and "double" not in lists else site.block + 1
        if isinstance(lists, list):
            expected = lists[site.block]
        assert options.own_rank(site) == expected


def test_a_block_of_rank_0_is_left_out():
    found = chosen(flux(), FLUX, block_ranks=[0, 4, 0, 4, 4])
    assert {site.block for site in found} == {1, 3, 4}


ENCODERS = text("text_encoder", "text_encoder_2", "t5.text_encoder_3")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, ["text_encoder", "text_encoder_2"]),
        (["clip_g"], ["text_encoder_2"]),
        (["text_encoder_3", "clip_l"], ["text_encoder", "text_encoder_3"]),
        (["clip_l", "clip_g", "t5"], ["text_encoder", "text_encoder_2", "text_encoder_3"]),
    ],
)
def test_t5_is_trained_where_it_is_asked_for(wanted: list[str] | None, expected: list[str]):
    found = chosen([*flux(), *ENCODERS], FLUX, text_encoders=wanted)
    assert list(dict.fromkeys(site.component for site in found)) == ["transformer", *expected]


def test_flux_has_t5_behind_the_first_clip():
    sites = text("text_encoder", "t5.text_encoder_2")
    assert {site.component for site in chosen(sites)} == {"text_encoder"}
    assert {site.component for site in chosen(sites, text_encoders=["t5"])} == {"text_encoder_2"}
    told = refusal(sites, text_encoders=["clip_g"])
    assert "has no clip_g. It has clip_l (text_encoder), t5 (text_encoder_2)." in told


@pytest.mark.parametrize(
    ("sites", "wanted", "told"),
    [
        (flux(), ["clip_l"], "network.train leaves the text encoders out"),
        (text("text_encoder"), ["clip_l"], "has one text encoder alone"),
        (ENCODERS, ["clip_l", "text_encoder"], "names one of them by two words"),
    ],
)
def test_text_encoders_without_effect_are_refused(sites: list[Site], wanted: list[str], told: str):
    assert told in refusal(sites, FLUX, text_encoders=wanted)


def test_a_base_without_residual_blocks_has_no_convolutions_to_train():
    with pytest.raises(OptionError, match=r"Choose network\.kind: lora in locon's place"):
        chosen(flux(), FLUX, convolutions=True)
    assert chosen(text("text_encoder"), convolutions=True)  # that is told elsewhere


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"layers": "atention"}, "'atention' is no preset. Did you mean 'attention'?"),
        ({"layers": "*.attn1.*"}, "Globs stand in a list: ['*.attn1.*']"),
        ({"layers": []}, "it has no word"),
        ({"layers": ["!"]}, "it has no word, or an empty one"),
        ({"layers": ["mlp", "mlp"]}, "'mlp' is there twice"),
        ({"blocks": {"double": "3-1"}}, "3-1 goes down. Write 1-3."),
        ({"blocks": {"double": "first"}}, 'Write numbers and ranges, e.g. "0-7,12", all, or none'),
        ({"blocks": {"double": [-1]}}, "network.blocks.double is '-1'. Write numbers"),
        ({"blocks": {"double": ""}}, "network.blocks.double is ''. Write numbers"),
        ({"ranks": {"mlp": -1}}, "greater than or equal to 0"),
        ({"alphas": {"mlp": 0}}, "greater than 0"),
        ({"block_ranks": "2,x"}, "valid integer"),
        ({"block_ranks": {"double": "2,"}}, "valid integer"),
        ({"text_encoders": ["clip"]}, "input should be 'clip_l', 'clip_g', 't5'"),
        ({"text_encoders": ["t5", "t5"]}, "names one twice"),
        ({"text_encoders": []}, "at least 1 item"),
    ],
)
def test_what_cannot_be_read_is_refused(words: dict[str, Any], told: str):
    with pytest.raises(ValidationError) as caught:
        LayerOptions(**words)
    assert told in " ".join(explain(caught.value, LayerOptions))


def test_the_examples_of_the_options_can_be_read():
    for word, field in LayerOptions.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        examples = extra["examples"]
        assert isinstance(examples, list)
        for example in examples:
            options = LayerOptions(**{word: example})
            assert set(options.given) == {word}
            assert LayerOptions.model_validate_json(options.model_dump_json()) == options


def test_nothing_is_given_where_nothing_is_said():
    assert LayerOptions().given == {}
    site = replace(flux()[0], block=3)
    assert (LayerOptions().own_rank(site), LayerOptions().own_alpha(site)) == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        # attention, attention_mlp, usual, all_linear, usual with the residual blocks, all
        # SD 1.5: 16 transformers; 22 residual blocks, 14 shortcuts; time 2, conv_in and conv_out
        ("sd15", (16 * 8, 16 * 10, 192, 192 + 22 + 14 + 2, 192 + 86, 192 + 86 + 2 + 2)),
        # SDXL: 70 blocks in 11 transformers; 17 residual blocks, 11 shortcuts; time 2, sizes 2
        ("sdxl", (70 * 8, 70 * 10, 722, 722 + 17 + 11 + 4, 722 + 66, 722 + 66 + 4 + 2)),
        # FLUX: 8 and 3 attention, 4 and 2 MLP, 2 and 1 modulation; six in time and text, 4 ends
        ("flux1", (19 * 8 + 38 * 3, 19 * 12 + 38 * 5, 494, 494 + 10, None, 494 + 10)),
        # SD 3: the last block has no way out for the text; four in time and text, 3 ends, patches
        ("sd3", (24 * 8 - 1, 24 * 12 - 3, 333, 333 + 7, None, 333 + 8)),
    ],
)
def test_presets_choose_as_many_layers_as_the_true_configs_have(
    kind: str, counts: tuple[int | None, ...]
):
    sites = true_sites(kind)
    presets = ("attention", "attention_mlp", "usual", "all_linear", "usual", "all")
    blocks = {"flux1": (19, 0, 38), "sd3": (24, 0, 0), "sdxl": (9, 3, 9)}.get(kind, SD1[0])
    for place, (preset, count) in enumerate(zip(presets, counts, strict=True)):
        if count is None:
            continue
        options = LayerOptions(layers=preset)
        found = chosen_sites(options, sites, convolutions=place == 4, blocks=blocks)
        assert sum(site.kind != "norm" for site in found) == count, preset
        assert all(site.kernel == (1, 1) for site in found) == (place < 4 or kind == "flux1")


def true_sites(kind: str) -> list[Site]:
    """Of the true denoisers, on the meta device."""
    if kind == "sd15":
        return unet_sites(empty_unet(Configured({"unet": SD15_UNET})), sd_block)
    if kind == "sdxl":
        return unet_sites(empty_unet(Configured({"unet": SDXL_UNET})), lambda path: None)
    import diffusers

    with torch.device("meta"):
        if kind == "flux1":
            made: Any = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        else:
            made = diffusers.SD3Transformer2DModel(num_layers=24, num_attention_heads=24)
    doubles = {"flux1": ("double", 19), "sd3": ("joint", 24)}[kind]
    return dit_sites(made, section=doubles[0], doubles=doubles[1])


def test_a_word_that_the_base_has_no_layer_of_is_not_advised_to_itself():
    sites = [Site("transformer.proj", "linear", 4, 4, role="attention")]
    assert "'norm'" not in nearest("norm", sites)
