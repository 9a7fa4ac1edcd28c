"""Rates by model, block and parameter, against sd-scripts' own groups."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from least_squares import each
from pydantic import ValidationError
from torch import nn

from raylora.base.errors import OptionError
from raylora.base.site import Site
from raylora.optim import groups as optim_groups
from raylora.optim.block_rates import BlockRates, block_weights
from raylora.optim.groups import Group, leave_out, rates_at, text_stop_step
from raylora.optim.optimizers import OptimizerOptions, make_optimizer
from raylora.optim.schedules import ScheduleOptions, make_schedule

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "param_groups.json").read_text())
CASES: list[dict[str, Any]] = GOLDEN["cases"]
SD1 = (12, 1, 12)
BLOCKS = {"sd15": (SD1, False), "sdxl": ((9, 3, 9), True)}
trained_sites = partial(optim_groups.trained_sites, counts=SD1)
make_groups = partial(optim_groups.make_groups, counts=SD1, fast=("up",))


def sd15_block(module: str) -> int:
    """The index of a UNet module, by the rule of sd-scripts' counting."""
    if "mid_block" in module:
        return 12
    way, i, kind, j = re.findall(r"(down|up)_blocks_(\d)_([a-z]+)_(\d)", module)[0]
    place = 2 if kind.endswith("samplers") else int(j)
    return (1 if way == "down" else 13) + 3 * int(i) + place


def site(name: str, block: int | None = None) -> Site:
    return Site(name, "linear", 4, 4, block=block)


def sites_of(case: dict[str, Any]) -> list[Site]:
    """The reference's modules, by name in SD 1.5; by their number a block in SDXL."""
    text = [site(f"text_encoder.{i}") for i in range(case["n_te"])]
    if case["family"] == "sdxl":
        blocks = next(c for c in CASES if c["network_args"].get("up_lr_weight") == "cosine")
        return text + [
            site(f"unet.{group['description']}.{i}", int(group["description"][10:]))
            for group in blocks["groups"][1:]
            for i in range(group["n_modules"])
        ]
    convolved = "conv_dim" in case["network_args"]
    names = GOLDEN["unet_modules" if convolved else "without_convolutions"]
    return text + [site(f"unet.{name}", sd15_block(name)) for name in names]


def options_of(case: dict[str, Any]) -> OptimizerOptions:
    words = {
        "loraplus_lr_ratio": "lora_plus_ratio",
        "loraplus_unet_lr_ratio": "lora_plus_denoiser_ratio",
        "loraplus_text_encoder_lr_ratio": "lora_plus_text_encoder_ratio",
    }
    given = case["network_args"]
    return OptimizerOptions(
        learning_rate=case["default_lr"],
        denoiser_rate=case["unet_lr"],
        text_encoder_rate=case["text_encoder_lr"],
        block_rates={
            part: given[f"{part}_lr_weight"]
            for part in ("down", "mid", "up")
            if f"{part}_lr_weight" in given
        },
        **{ours: float(given[theirs]) for theirs, ours in words.items() if theirs in given},
    )


def both(site: Site) -> Sequence[str]:
    return ("down", "up")


def test_the_rule_of_blocks_is_the_references():
    for module, block in GOLDEN["block_index"].items():
        assert sd15_block(module) == block


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['family']}-{c['network_args']}-{c['text_encoder_lr']:g}"
)
def test_the_groups_are_those_of_sd_scripts(case: dict[str, Any]):
    options, (counts, ends) = options_of(case), BLOCKS[case["family"]]
    if case["block_lr_weight"] is not None:
        ours = block_weights(options.block_rates, counts, ends=ends)
        assert ours == pytest.approx(case["block_lr_weight"], rel=1e-12, abs=0)
    sites = trained_sites(options, sites_of(case), counts=counts, ends=ends)
    groups = make_groups(options, sites, both, 4, counts=counts, ends=ends)
    assert [group.name for group in groups] == [one["description"] for one in case["groups"]]
    for group, one in zip(groups, case["groups"], strict=True):
        assert group.rate == pytest.approx(one["lr"], rel=1e-9)
        assert len(group.members) == one["n_tensors"]
        names = [name for name, _ in group.members]
        assert len(set(names)) == one["n_modules"]
        if case["family"] == "sd15" and group.part == "denoiser":
            assert min(names) == f"unet.{one['first_module']}"
            assert max(names) == f"unet.{one['last_module']}"
        if "loraplus_lr_ratio" in case["network_args"]:
            fast = group.name.endswith(" plus")
            assert {word for _, word in group.members} == ({"up"} if fast else {"down"})


def test_blocks_and_lora_plus_together_make_two_groups_a_block():
    """The values are the products: 2e-4 * 0.5 = 1e-4, times 16 = 1.6e-3."""
    options = OptimizerOptions(
        learning_rate=2e-4, lora_plus_ratio=16, block_rates={"up": [0.5, 0], "mid": 2}
    )
    sites = trained_sites(
        options, [site("unet.a", 13), site("unet.b", 14), site("unet.c", 12), site("unet.d", 3)]
    )
    groups = make_groups(options, sites, both, 1)
    assert [(g.name, round(g.rate, 10), g.members) for g in groups] == [
        ("unet_block13", 1e-4, (("unet.a", "down"),)),
        ("unet_block13 plus", 1.6e-3, (("unet.a", "up"),)),
        ("unet_block12", 4e-4, (("unet.c", "down"),)),
        ("unet_block12 plus", 6.4e-3, (("unet.c", "up"),)),
        ("unet_block3", 2e-4, (("unet.d", "down"),)),
        ("unet_block3 plus", 3.2e-3, (("unet.d", "up"),)),
    ]


@pytest.mark.parametrize(("kind", "factor"), [("none", 1.0), ("linear", 9.0), ("sqrt", 3.0)])
def test_rates_grow_with_the_images_of_a_step_where_asked(kind: Any, factor: float):
    options = OptimizerOptions(scale_rate=kind, text_encoder_rate=1e-5)
    groups = make_groups(options, [site("unet.a", 1), site("text_encoder.a")], both, 9)
    assert [g.rate for g in groups] == pytest.approx([1e-5 * factor, 1e-4 * factor])


def test_a_negative_rate_is_its_size_and_a_turned_sign():
    options = OptimizerOptions(learning_rate=-1e-4, text_encoder_rate=2e-5, lora_plus_ratio=4)
    groups = make_groups(options, [site("unet.a", 1), site("text_encoder.a")], both, 1)
    assert [(g.name, g.rate, g.sign) for g in groups] == [
        ("textencoder", 2e-5, 1),
        ("textencoder plus", 8e-5, 1),
        ("unet", 1e-4, -1),
        ("unet plus", 4e-4, -1),
    ]


def test_lora_plus_moves_up_by_the_ratio_faster():
    """AdamW's first step, in float64: rate * sign, and without decay nothing else."""
    options = OptimizerOptions(learning_rate=1e-3, weight_decay=0, eps=1e-30, lora_plus_ratio=16)
    groups = make_groups(options, [site("unet.a", 1)], both, 1)
    held = {("unet.a", word): nn.Parameter(torch.zeros(3).double()) for word in ("down", "up")}
    optimizer = make_optimizer(
        options,
        [
            {"params": [held[m] for m in group.members], "rate": group.rate, "name": group.name}
            for group in groups
        ],
    )
    for parameter in held.values():
        parameter.grad = torch.tensor([2.0, -3.0, 5.0]).double()
    optimizer.step()
    sign = np.array([1.0, -1.0, 1.0])
    assert held["unet.a", "down"].detach().numpy() == pytest.approx(-1e-3 * sign, rel=1e-9)
    assert held["unet.a", "up"].detach().numpy() == pytest.approx(-1.6e-2 * sign, rel=1e-9)


@pytest.mark.parametrize(
    ("words", "told"),
    [(("w1", "w2"), "this network has no such halves"), (("up",), "`down` is frozen")],
)
def test_lora_plus_needs_a_fast_and_a_slow_half(words: tuple[str, ...], told: str):
    with pytest.raises(OptionError, match=told):
        make_groups(OptimizerOptions(lora_plus_ratio=4), [site("unet.a", 1)], lambda site: words, 1)


def test_the_network_says_what_lora_plus_moves_faster():
    (slow, fast) = make_groups(
        OptimizerOptions(lora_plus_ratio=4),
        [site("unet.a", 1)],
        lambda site: ("a1", "b1", "b2"),
        1,
        fast=("b1", "b2"),
    )
    assert (slow.members, slow.rate) == ((("unet.a", "a1"),), 1e-4)
    assert [word for _, word in fast.members] == ["b1", "b2"]
    assert fast.rate == pytest.approx(4e-4, rel=1e-12)


ENCODERS = [site(f"text_encoder{number}.a") for number in ("", "_2", "_3")]


def test_each_text_encoder_has_its_own_rate():
    """With --text_encoder_lr as a list, sd-scripts calls them textencoder 1, 2, ..."""
    options = OptimizerOptions(text_encoder_rate=[5e-5, -1e-5, 2e-5], lora_plus_ratio=16)
    groups = make_groups(options, [*ENCODERS, site("unet.a", 1)], both, 1)
    told = [(g.name, g.part == "text_encoder", round(g.rate, 9), g.sign) for g in groups]
    assert told == [
        ("textencoder 1", True, 5e-5, 1),
        ("textencoder 1 plus", True, 8e-4, 1),
        ("textencoder 2", True, 1e-5, -1),
        ("textencoder 2 plus", True, 1.6e-4, -1),
        ("textencoder 3", True, 2e-5, 1),
        ("textencoder 3 plus", True, 3.2e-4, 1),
        ("unet", False, 1e-4, 1),
        ("unet plus", False, 1.6e-3, 1),
    ]


@pytest.mark.parametrize(
    ("rates", "sites", "left"),
    [
        ([1e-5, 0, 0], ENCODERS[:1], 1),
        ([0, 1e-5], [ENCODERS[1]], 1),
        ([1e-5, 0, 1e-5], ENCODERS, 2),
        ([1e-5], ENCODERS, 3),
    ],
)
def test_text_encoders_of_rate_0_get_no_adapter(rates: list[float], sites: list[Site], left: int):
    assert len(trained_sites(OptimizerOptions(text_encoder_rate=rates), sites)) == left


@pytest.mark.parametrize(
    ("rates", "sites", "told"),
    [
        ([1e-5, 1e-5], ENCODERS, "has 2 numbers, and text_encoder_3 is trained too"),
        ([1e-5, 2e-5], ENCODERS[:1], "has 2e-05 for text encoder 2, which carries no adapter"),
        ([1e-5, 2e-5], [ENCODERS[1]], "has 1e-05 for text encoder 1, which carries no adapter"),
    ],
)
def test_rates_that_fit_other_text_encoders_are_refused(
    rates: list[float], sites: list[Site], told: str
):
    with pytest.raises(OptionError, match=told):
        trained_sites(OptimizerOptions(text_encoder_rate=rates), sites)


def test_layers_have_the_factor_of_the_first_glob_that_fits():
    """Products in float64: 1e-4 * 0.5 (block) * 3 = 1.5e-4, times 4 = 6e-4 with LoRA+."""
    options = OptimizerOptions(
        rates={"*.attn2.to_k": 0, "*.attn2.*": 3, "mlp": 0.25},
        block_rates={"down": [0, 0.5]},
        lora_plus_ratio=4,
    )
    sites = [
        site("unet.attn2.to_q", 1),
        site("unet.attn2.to_k", 1),
        site("unet.attn1.to_q", 1),
        Site("unet.ff", "linear", 4, 4, role="mlp"),
        site("text_encoder.attn2.to_q"),
    ]
    kept = trained_sites(options, sites)
    assert [one.name for one in kept] == [one.name for one in sites if "to_k" not in one.name]
    groups = make_groups(options, kept, both, 1)
    told = [(g.name, pytest.approx(g.rate, rel=1e-12)) for g in groups]
    assert told == [
        ("textencoder reg_lr_1", 3e-4),
        ("textencoder reg_lr_1 plus", 1.2e-3),
        ("unet_block1 reg_lr_1", 1.5e-4),
        ("unet_block1 reg_lr_1 plus", 6e-4),
        ("unet_block1", 5e-5),
        ("unet_block1 plus", 2e-4),
        ("unet reg_lr_2", 2.5e-5),
        ("unet reg_lr_2 plus", 1e-4),
    ]


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ({"*.attn3.*": 2}, "means no layer that carries the adapter"),
        ({"attenton": 2}, "Did you mean 'attention'"),
        ({"unet.*": 2, "*.attn1.*": 3}, "others before it fit all of its layers"),
        ({"*": 0}, "rates are 0 for each that network.train and network.layers choose"),
    ],
)
def test_factors_that_change_nothing_are_refused(rates: dict[str, float], told: str):
    with pytest.raises(OptionError, match=told):
        trained_sites(OptimizerOptions(rates=rates), [site("unet.attn1.to_q", 1)])


def test_a_part_without_rate_gets_no_adapter():
    sites = [site("unet.a", 1), site("unet.b", 2), site("text_encoder.a")]
    kept = trained_sites(OptimizerOptions(text_encoder_rate=0), sites)
    assert [one.name for one in kept] == ["unet.a", "unet.b"]
    kept = trained_sites(OptimizerOptions(denoiser_rate=0), sites)
    assert [one.name for one in kept] == ["text_encoder.a"]
    low = OptimizerOptions(block_rates={"down": [0, 0.3, 0.31], "zero_threshold": 0.3})
    assert [one.name for one in trained_sites(low, sites)] == ["unet.b", "text_encoder.a"]
    with pytest.raises(OptionError, match="No layer is left to train"):
        trained_sites(OptimizerOptions(text_encoder_rate=0), sites[2:])
    with pytest.raises(OptionError, match="the network sits on none"):
        trained_sites(OptimizerOptions(), [])


def test_the_text_encoder_stops_after_its_share_of_the_run():
    options = OptimizerOptions(text_encoder_stop=0.25)
    groups = make_groups(options, [site("unet.a", 1), site("text_encoder.a")], both, 1)
    factor = make_schedule(ScheduleOptions(name="linear"), 10)
    rates = [rates_at(groups, factor, step, 10, options) for step in range(10)]
    assert [text > 0 for text, _ in rates] == [True] * 3 + [False] * 7  # 0.25 * 10 rounded up
    assert [unet for _, unet in rates] == pytest.approx([1e-4 * (1 - t / 10) for t in range(10)])
    assert text_stop_step(options, 10) == 3
    assert text_stop_step(OptimizerOptions(), 10) is None


@pytest.mark.parametrize(
    "name",
    each(["adamw", "adamw8bit", "lion", "adafactor", "sgd_nesterov", "adamw_schedule_free"]),
)
def test_a_part_that_is_left_out_does_not_move(name: str):
    options = OptimizerOptions(name=name)
    groups = [
        Group("textencoder", "text_encoder", options.rate, 1, (("text_encoder.a", "up"),)),
        Group("unet", "denoiser", options.rate, 1, (("unet.a", "up"),)),
    ]
    text, unet = (nn.Parameter(torch.ones(100, 50)) for _ in groups)
    optimizer = make_optimizer(
        options,
        [
            {"params": [parameter], "rate": group.rate, "name": group.name}
            for parameter, group in zip((text, unet), groups, strict=True)
        ],
    )
    for step in range(6):
        for parameter in (text, unet):
            parameter.grad = parameter.detach().clone()
        if step == 3:
            stopped, went = text.detach().clone(), unet.detach().clone()
        if step >= 3:
            leave_out(optimizer, groups, "text_encoder")
        optimizer.step()
    assert torch.equal(text, stopped)
    assert not torch.equal(text, torch.ones(100, 50))
    assert not torch.equal(unet, went)


SHAPES = [
    ("linear", [0, 1 / 11, 2 / 11]),
    ("reverse_linear+.5", [1.5, 10 / 11 + 0.5, 9 / 11 + 0.5]),
    ("zeros+0.3", [0.3, 0.3, 0.3]),
    ("sine", [0, np.sin(np.pi / 22), np.sin(np.pi / 11)]),
    (0.5, [0.5, 0.5, 0.5]),
    ([0.5, 2], [0.5, 2, 1]),
    ("0.5,,2", [0.5, 0, 2]),
]


@pytest.mark.parametrize(("written", "first"), SHAPES, ids=str)
def test_block_rates_are_read_as_written(written: Any, first: list[float]):
    weights = block_weights(BlockRates(up=written), SD1)
    assert weights[:13] == [1.0] * 13
    assert weights[13:16] == pytest.approx(first)
    assert len(weights) == 25


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"down": "sin"}, "Did you mean 'sine'"),
        ({"down": "sine+x"}, "after \\+ comes a number"),
        ({"down": "1;2"}, "neither numbers with commas"),
        ({"mid": "sine"}, "a shape needs many blocks"),
        ({"mid": [1, 2, 3, 4]}, "has 4 numbers, and there are 3 such blocks"),
        ({"down": [1] * 13}, "has 13 numbers, and there are 12"),
        ({"up": [1, -0.5]}, "no block can have less than 0"),
        ({"zero_threshold": 0.1}, "no block has a rate of its own"),
        ({"down": {"a": 1}}, "valid"),
    ],
)
def test_block_rates_that_cannot_be_read_are_refused(words: dict[str, Any], told: str):
    with pytest.raises(ValidationError, match=told):
        OptimizerOptions(block_rates=words)


FLUX, SD3 = (19, 0, 38), (24, 0, 0)


def test_transformers_count_their_stretches_on():
    flux = BlockRates(double=[0, 0.5], single="linear", zero_threshold=0.1)
    weights = block_weights(flux, FLUX)
    linear = [i / 37 for i in range(38)]
    expected = [0, 0.5, *[1] * 17, *(w if w > 0.1 else 0 for w in linear)]
    assert weights == pytest.approx(expected, rel=1e-12)
    joint = block_weights(BlockRates(joint="0.5,,2"), SD3)
    assert joint == [0.5, 0, 2, *[1] * 21]


def test_a_stretch_of_one_block_has_a_shape_too():
    assert block_weights(BlockRates(double="linear+1"), (1, 0, 2)) == [1, 1, 1]


@pytest.mark.parametrize(
    ("words", "counts", "told"),
    [
        ({"double": 1}, SD1, "double is given, and this base has no such blocks. It has down, mid"),
        ({"down": 0.5}, FLUX, "It has double, single"),
        ({"single": 0.5}, SD3, "It has joint"),
        ({"double": [1] * 20}, FLUX, "has 20 numbers, and there are 19"),
        ({"mid": [1, 2]}, SD1, "has 2 numbers, and there are 1"),
        ({"down": [1] * 10}, (9, 3, 9), "has 10 numbers, and there are 9"),
    ],
)
def test_rates_of_blocks_that_the_base_has_not_are_refused(
    words: dict[str, Any], counts: tuple[int, int, int], told: str
):
    with pytest.raises(OptionError, match=told):
        block_weights(BlockRates(**words), counts)


@pytest.mark.parametrize(
    ("rates", "word"),
    [
        ({"down": 0.5}, "down"),
        ({"down": [0.5]}, "down"),
        ({"mid": 0.5, "up": [1, 0.5]}, "up"),
        ({"mid": 0.5, "up": 0.2, "zero_threshold": 0.3}, "up"),
        ({"mid": 0.5, "zero_threshold": 0.1}, None),
        ({"mid": 0.5, "up": 1}, None),
    ],
)
def test_rates_of_blocks_that_carry_no_adapter_are_refused(rates: dict[str, Any], word: str | None):
    options, sites = OptimizerOptions(block_rates=rates), [site("unet.a", 12), site("unet.time")]
    if word is None:
        assert trained_sites(options, sites)
        return
    with pytest.raises(OptionError, match=rf"block_rates\.{word} is for blocks that carry no"):
        trained_sites(options, sites)
