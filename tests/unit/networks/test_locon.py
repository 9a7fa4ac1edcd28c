"""LoCon's own: width and strength on larger convolutions, and their first weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raylora.base.site import Site
from raylora.networks.locon import LoconOptions, network

LINEAR = Site("unet.q", "linear", 40, 30)
SMALL = Site("unet.p", "conv", 40, 30)
LARGE = Site("unet.c", "conv", 40, 30, kernel=(3, 3), padding=(1, 1))


@pytest.mark.parametrize(
    ("words", "others", "large"),
    [
        ({"rank": 8}, (8, 1.0), (8, 1.0)),
        ({"rank": 8, "alpha": 2.0}, (8, 0.25), (8, 1.0)),
        ({"rank": 8, "conv_rank": 4}, (8, 1.0), (4, 1.0)),
        ({"rank": 8, "alpha": 2.0, "conv_rank": 4, "conv_alpha": 2.0}, (8, 0.25), (4, 0.5)),
        ({"rank": 8, "conv_alpha": 2.0}, (8, 1.0), (8, 0.25)),
    ],
    ids=str,
)
def test_convolutions_larger_than_1x1_have_a_width_and_a_strength_of_their_own(
    words: dict[str, Any], others: tuple[int, float], large: tuple[int, float]
):
    options = LoconOptions(**words)
    for site, expected in ((LINEAR, others), (SMALL, others), (LARGE, large)):
        assert (options.rank_at(site), options.scale_at(site)) == expected


def test_first_weights_of_a_kernel_are_within_one_over_root_of_all_its_inputs():
    held = network.initial(
        LoconOptions(rank=50), LARGE, lambda shape: np.random.default_rng(0).uniform(-1, 1, shape)
    )
    bound = 1 / np.sqrt(40 * 9)
    assert held["down"].shape == (50, 40, 3, 3)
    assert 0.99 * bound < abs(held["down"]).max() <= bound
    assert not held["up"].any()
