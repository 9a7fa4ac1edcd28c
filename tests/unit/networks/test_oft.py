"""OFT: rotations are rotations, their limit, their file, where they fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from frozen_layers import LAYERS, Trained, normal
from pydantic import ValidationError
from torch.testing import assert_close

from raylora.base.site import Site
from raylora.networks.oft import OftOptions, block_size, fits, limited, turn

ROUNDING = 1e-12  # float64 in another order
every_layer = pytest.mark.parametrize("name", LAYERS)


def trained(name: str, *, size: float = 0.3, **given: Any) -> Trained:
    return Trained(name, OftOptions(**{"rank": 4, **given}), size=size, outputs=16)


def test_a_turn_is_cayleys_and_orthogonal():
    blocks = normal(0, 5, 4, 4)
    eye = torch.eye(4, dtype=torch.float64)
    skew = blocks - blocks.mT
    expected = torch.stack([(eye + q) @ torch.linalg.inv(eye - q) for q in skew])
    rotation = eye + turn(blocks, 0.0)
    assert_close(rotation, expected, rtol=0, atol=ROUNDING)
    assert_close(rotation @ rotation.mT, eye.expand(5, 4, 4), rtol=0, atol=ROUNDING)
    assert_close(torch.linalg.det(rotation), torch.ones(5).double(), rtol=0, atol=ROUNDING)


def test_a_small_turn_keeps_its_digits():
    small = 1e-7 * normal(0, 5, 4, 4)
    exact = turn(small, 0.0)
    assert_close(turn(small.float(), 0.0).double(), exact, rtol=1e-5, atol=1e-13)


@every_layer
def test_rows_are_turned_within_their_blocks_and_the_bias_is_not(name: str):
    one = trained(name)
    eye = torch.eye(4, dtype=torch.float64)
    blocks = one.held["oft_blocks"]
    assert blocks.shape == (4, 4, 4)
    rotation = torch.block_diag(*(eye + turn(blocks, 0.0)).mT)
    expected = (rotation @ one.frozen.flatten(1)).view(one.frozen.shape)
    assert (expected - one.frozen).abs().max() > 0.3
    assert_close(one.output(), one.of_weight(expected), rtol=0, atol=1e-11)
    assert_close(one.merged()["weight"], expected, rtol=0, atol=ROUNDING)
    assert_close(one.read()["weight"], expected, rtol=0, atol=ROUNDING)
    assert_close(one.output(one.first), one.layer(one.x), rtol=0, atol=0)


@every_layer
def test_the_angles_between_inputs_weights_stay(name: str):
    one = trained(name)
    before, after = one.frozen.flatten(1), one.merged()["weight"].flatten(1)
    assert_close(after.T @ after, before.T @ before, rtol=0, atol=1e-11)


@every_layer
def test_outputs_may_have_strengths_of_their_own(name: str):
    one = trained(name, rescale=True)
    assert torch.equal(one.first["rescale"], torch.ones(16).double())
    plain = {"oft_blocks": one.held["oft_blocks"]}
    frozen = dict(one.layer.named_parameters())
    turned = one.network.merged(plain, one.site, one.scale, frozen)["weight"]
    expected = (one.held["rescale"][:, None] * turned.flatten(1)).view(turned.shape)
    assert_close(one.output(), one.of_weight(expected), rtol=0, atol=1e-11)
    assert_close(one.merged()["weight"], expected, rtol=0, atol=ROUNDING)
    assert_close(one.read()["weight"], expected, rtol=0, atol=ROUNDING)
    assert one.file["rescale"].shape == ((16, 1) if name == "tokens" else (16, 1, 1, 1))


def test_the_limit_is_of_the_norm_over_the_whole_layer():
    blocks = normal(0, 5, 4, 4)
    norm = float((blocks - blocks.mT).norm())
    assert float(limited(blocks, 0.5).norm()) == pytest.approx(0.5, rel=1e-7)
    assert_close(limited(blocks, 0.5) * norm / 0.5, blocks - blocks.mT, rtol=1e-7, atol=0)
    for enough in (0.0, norm * 1.01, torch.tensor(0.0), torch.tensor(norm * 1.01)):
        assert torch.equal(limited(blocks, enough), blocks - blocks.mT)
    assert_close(limited(blocks, torch.tensor(0.5)), limited(blocks, 0.5), rtol=0, atol=0)
    assert not limited(0 * blocks, 0.5).any()


@every_layer
def test_a_limited_rotation_is_read_without_its_limit(name: str):
    one = trained(name, alpha=0.01)
    assert one.scale == pytest.approx(0.16)
    assert (2 * one.file["oft_blocks"]).norm() == pytest.approx(0.16, rel=1e-6)
    assert float(one.file["alpha"]) == 0.0
    assert_close(one.read()["weight"], one.merged()["weight"], rtol=0, atol=ROUNDING)
    assert_close(one.output(), one.of_weight(one.merged()["weight"]), rtol=0, atol=1e-11)
    assert not torch.allclose(one.output(), one.output(scale=0.0), atol=1e-3)


@pytest.mark.parametrize(
    ("outputs", "rank", "size"), [(320, 16, 16), (320, 64, 16), (640, 12, 10), (9, 4, 3), (7, 4, 1)]
)
def test_a_block_is_the_largest_divisor_up_to_rank_and_root(outputs: int, rank: int, size: int):
    site = Site("toy.tokens", "linear", 12, outputs)
    assert block_size(OftOptions(rank=rank), site) == size


def test_it_says_where_it_cannot_sit():
    options = OftOptions(rank=4)
    assert fits(options, Site("toy.tokens", "linear", 12, 8)) is None
    why = fits(options, Site("toy.tokens", "linear", 12, 7))
    assert why is not None
    assert "its 7 outputs have no divisor from 2 to network.rank 4" in why
    assert fits(options, Site("toy.norm", "norm", 8, 8)) is not None
    with pytest.raises(ValidationError):
        OftOptions(rank=1)
    with pytest.raises(ValidationError, match=r"network\.dropout: oft has none"):
        OftOptions(dropout=0.1)
