"""LoKr: the Kronecker product, how layers are split, its strength, its file, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from frozen_layers import LAYERS, Trained
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from raylora.networks.lokr import LokrOptions, blocks_at, two_factors

ROUNDING = 1e-12  # float64 in another order
every_layer = pytest.mark.parametrize("name", LAYERS)
FORMS: list[dict[str, Any]] = [
    {"rank": 1, "alpha": 1.5},
    {"rank": 1, "alpha": 1.5, "factor": 2},
    {"rank": 1, "alpha": 1.5, "decompose_both": True},
    {"rank": 1, "alpha": 1.5, "tucker": True},
    {"rank": 1, "alpha": 1.5, "unbalanced": True},
    {"rank": 8, "alpha": 12.0},
    {"full_matrix": True, "factor": 4},
]


def trained(name: str, **given: Any) -> Trained:
    return Trained(name, LokrOptions(**given))


def whole(one: Trained, block: str) -> Tensor:
    """A block of its parts."""
    held = one.held
    if f"lokr_{block}" in held:
        return held[f"lokr_{block}"]
    outer, inner = held[f"lokr_{block}_a"], held[f"lokr_{block}_b"]
    if "lokr_t2" in held and block == "w2":
        return torch.einsum("abhw,ao,bi->oihw", held["lokr_t2"], outer, inner)
    return torch.einsum("or,r...->o...", outer, inner)


@pytest.mark.parametrize("given", FORMS, ids=str)
@every_layer
def test_the_change_is_the_kronecker_product(name: str, given: dict[str, Any]):
    one = trained(name, **given)
    first, second = whole(one, "w1"), whole(one, "w2")
    if second.dim() == 4:
        first = first[:, :, None, None]
    strength = 1.0 if {"lokr_w1", "lokr_w2"} <= set(one.held) else 1.5
    change = strength * torch.kron(first, second.contiguous())
    expected = one.frozen + change.view(one.frozen.shape)
    assert change.abs().max() > 0.05
    assert_close(one.output(), one.of_weight(expected), rtol=0, atol=ROUNDING)
    assert_close(one.merged()["weight"], expected, rtol=0, atol=ROUNDING)
    # alpha has 24 bits in the file
    assert_close(one.read()["weight"], expected, rtol=0, atol=1e-6 if strength == 1 else ROUNDING)
    assert_close(one.output(one.first), one.layer(one.x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("size", "factor", "parts"),
    [
        (360, -1, (18, 20)),
        (320, -1, (16, 20)),
        (320, 8, (8, 40)),
        (320, 64, (5, 64)),
        (250, 4, (2, 125)),
        (360, 16, (15, 24)),
        (127, -1, (1, 127)),
        (49, -1, (7, 7)),
    ],
)
def test_a_size_is_split_near_the_factor(size: int, factor: int, parts: tuple[int, int]):
    assert two_factors(size, factor) == parts


@pytest.mark.parametrize(
    ("given", "first", "second"),
    [
        ({}, (2, 3), (4, 4)),
        ({"factor": 2}, (2, 2), (4, 6)),
        ({"unbalanced": True}, (4, 3), (2, 4)),
        ({"factor": 1}, (1, 1), (8, 12)),
    ],
    ids=str,
)
def test_the_blocks_of_a_layer(given: dict[str, Any], first: Any, second: Any):
    options = LokrOptions(rank=1, **given)
    blocks = blocks_at(options, trained("tokens", rank=1).site)
    assert (blocks.first, blocks.second) == (first, second)
    assert blocks.first_whole
    assert not blocks.second_whole


def test_a_block_stays_whole_where_a_product_would_not_be_smaller():
    site = trained("tokens", rank=1).site  # blocks of 2 x 3 and 4 x 4

    def whole_at(**given: Any) -> tuple[bool, bool]:
        blocks = blocks_at(LokrOptions(**given), site)
        return blocks.first_whole, blocks.second_whole

    assert whole_at(rank=1) == (True, False)
    assert whole_at(rank=1, decompose_both=True) == (False, False)
    assert whole_at(rank=2) == (True, True)
    assert whole_at(rank=2, decompose_both=True) == (True, True)
    assert whole_at(full_matrix=True) == (True, True)


def test_where_both_blocks_are_whole_the_strength_is_1():
    site = trained("tokens", rank=1).site
    assert LokrOptions(rank=1, alpha=0.5).scale_at(site) == 0.5
    assert LokrOptions(rank=2, alpha=0.5).scale_at(site) == 1.0
    assert LokrOptions(full_matrix=True).scale_at(site) == 1.0


def test_a_strength_of_whole_blocks_is_in_the_file_as_readers_apply_none():
    one = trained("tokens", full_matrix=True)
    file = one.network.export(one.held, one.site, 0.25)
    assert torch.equal(file["lokr_w1"], 0.25 * one.held["lokr_w1"])
    assert torch.equal(file["lokr_w2"], one.held["lokr_w2"])
    assert float(file["alpha"]) == 1.0


def test_the_file_has_lycoris_words_and_shapes():
    def shapes(**given: Any) -> dict[str, tuple[int, ...]]:
        return {word: tuple(t.shape) for word, t in trained("kernel", **given).file.items()}

    assert shapes(rank=1) == {
        "lokr_w1": (2, 3),
        "lokr_w2_a": (4, 1),
        "lokr_w2_b": (1, 36),
        "alpha": (),
    }
    assert shapes(rank=1, tucker=True, decompose_both=True) == {
        "lokr_w1_a": (2, 1),
        "lokr_w1_b": (1, 3),
        "lokr_t2": (1, 1, 3, 3),
        "lokr_w2_a": (1, 4),
        "lokr_w2_b": (1, 4),
        "alpha": (),
    }
    assert shapes(full_matrix=True) == {"lokr_w1": (2, 3), "lokr_w2": (4, 4, 3, 3), "alpha": ()}
    pixels = trained("pixels", full_matrix=True).file
    assert pixels["lokr_w2"].shape == (4, 4, 1, 1)
    assert float(trained("tokens", rank=1, alpha=0.75).file["alpha"]) == 0.75


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"rank": 4}, r"network\.rank 4 would do nothing"),
        ({"alpha": 4.0}, r"read at strength 1\. Leave out network\.alpha"),
        ({"alphas": {"mlp": 4.0}}, r"read at strength 1\. Leave out network\.alphas"),
        ({"decompose_both": True}, r"network\.decompose_both splits them"),
        ({"tucker": True}, r"network\.tucker splits the larger one"),
    ],
    ids=str,
)
def test_what_whole_blocks_make_useless_is_refused(given: dict[str, Any], why: str):
    with pytest.raises(ValidationError, match=why):
        LokrOptions(full_matrix=True, **given)


def test_a_factor_is_a_size_or_left_to_us():
    with pytest.raises(ValidationError):
        LokrOptions(factor=-2)
    with pytest.raises(ValidationError, match=r"network\.dropout: lokr has none"):
        LokrOptions(dropout=0.1)
