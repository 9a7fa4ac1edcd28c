"""What a layer's own rank and alpha do to a network's."""

from __future__ import annotations

import math
from typing import Any

import pytest

from raylora.base.site import Site
from raylora.networks.locon import LoconOptions
from raylora.networks.lora import LoraOptions

LINEAR = Site("unet.a.attn1.to_q", "linear", 8, 8, block=4)
CONV = Site("unet.a.conv1", "conv", 8, 8, kernel=(3, 3), block=4, role="residual")
BLOCK_4 = [1, 1, 1, 1, 6, *[1] * 20]


@pytest.mark.parametrize(
    ("words", "rank", "scale"),
    [
        ({"rank": 8}, 8, 1),
        ({"rank": 8, "alpha": 4}, 8, 4 / 8),
        ({"rank": 8, "ranks": {"attention": 2}}, 2, 1),
        ({"rank": 8, "alpha": 4, "ranks": {"attention": 2}}, 2, 4 / 2),
        ({"rank": 8, "alphas": {"*.to_q": 3}}, 8, 3 / 8),
        ({"rank": 8, "alpha": 4, "block_ranks": BLOCK_4}, 6, 4 / 6),
        ({"rank": 8, "alpha": 4, "block_alphas": BLOCK_4}, 8, 6 / 8),
        ({"rank": 8, "block_ranks": BLOCK_4, "ranks": {"attention": 2}}, 2, 1),
        ({"scaling": "sqrt_rank", "alpha": 3, "ranks": {"attention": 4}}, 4, 3 / math.sqrt(4)),
    ],
)
def test_a_layers_own_rank_and_alpha_come_first(words: dict[str, Any], rank: int, scale: float):
    options = LoraOptions(**words)
    assert (options.rank_at(LINEAR), options.scale_at(LINEAR)) == (rank, scale)


@pytest.mark.parametrize(
    ("words", "rank", "scale"),
    [
        ({"rank": 8, "alpha": 2}, 8, 1),
        ({"rank": 8, "conv_rank": 4, "conv_alpha": 1}, 4, 1 / 4),
        ({"conv_rank": 4, "conv_alpha": 1, "conv_block_ranks": BLOCK_4}, 6, 1 / 6),
        ({"conv_rank": 4, "conv_alpha": 1, "conv_block_alphas": BLOCK_4}, 4, 6 / 4),
        ({"rank": 8, "block_ranks": BLOCK_4}, 8, 1),
        ({"conv_rank": 4, "ranks": {"residual": 2}, "alphas": {"*.conv1": 5}}, 2, 5 / 2),
    ],
)
def test_convolutions_have_theirs_before_conv_rank(words: dict[str, Any], rank: int, scale: float):
    options = LoconOptions(**words)
    assert (options.rank_at(CONV), options.scale_at(CONV)) == (rank, scale)


def test_text_encoders_are_chosen_where_they_are_trained():
    with pytest.raises(ValueError, match=r"Leave it out, or set network\.train: both"):
        LoraOptions(text_encoders=["clip_l"])
    assert LoraOptions(train="both", text_encoders=["clip_l"]).text_encoders == ("clip_l",)
