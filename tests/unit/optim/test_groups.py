"""Rates by model, block and parameter, against sd-scripts' own groups."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
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
from raylora.optim.block_rates import BlockRates, block_weights
from raylora.optim.groups import (
    Group,
    leave_out,
    make_groups,
    rates_at,
    text_stop_step,
    trained_sites,
)
from raylora.optim.optimizers import OptimizerOptions, make_optimizer
from raylora.optim.schedules import ScheduleOptions, make_schedule

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "param_groups.json").read_text())
CASES: list[dict[str, Any]] = GOLDEN["cases"]
BLOCKS = {"sd15": ((12, 1, 12), False), "sdxl": ((9, 3, 9), True)}


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
    sites = trained_sites(options, sites_of(case), counts, ends=ends)
    groups = make_groups(options, sites, both, 4, counts, ends=ends)
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


def test_a_network_without_up_cannot_have_lora_plus():
    with pytest.raises(OptionError, match="moves `up` faster, and this network has no"):
        make_groups(
            OptimizerOptions(lora_plus_ratio=4), [site("unet.a", 1)], lambda site: ("w1", "w2"), 1
        )


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
    weights = block_weights(BlockRates(up=written))
    assert weights[:13] == [1.0] * 13
    assert weights[13:16] == pytest.approx(first)
    assert len(weights) == 25


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"down": "sin"}, "Did you mean 'sine'"),
        ({"down": "sine+x"}, "after \\+ comes a number"),
        ({"down": "1;2"}, "neither numbers with commas"),
        ({"mid": "sine"}, "a shape needs several blocks"),
        ({"mid": [1, 2]}, "has 2 numbers, and there are 1 such blocks"),
        ({"down": [1] * 13}, "has 13 numbers, and there are 12"),
        ({"up": [1, -0.5]}, "no block can have less than 0"),
        ({"zero_threshold": 0.1}, "no block has a rate of its own"),
        ({"down": {"a": 1}}, "valid"),
    ],
)
def test_block_rates_that_cannot_be_read_are_refused(words: dict[str, Any], told: str):
    with pytest.raises(ValidationError, match=told):
        OptimizerOptions(block_rates=words)
