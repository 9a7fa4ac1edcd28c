"""LoCon's own: width and strength on larger convolutions, and their first weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from raylora.base.site import Site
from raylora.networks import Call
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
        LoconOptions(rank=50),
        LARGE,
        lambda shape: np.random.default_rng(0).uniform(-1, 1, shape),
        lambda: np.empty(0),
    )
    bound = 1 / np.sqrt(40 * 9)
    assert held["down"].shape == (50, 40, 3, 3)
    assert 0.99 * bound < abs(held["down"]).max() <= bound
    assert not held["up"].any()


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
def test_tuckers_form_is_that_of_lycoris(stride: int):
    from lycoris.modules.locon import LoConModule

    layer = torch.nn.Conv2d(6, 5, 3, stride=stride, padding=1, dtype=torch.float64)
    site = Site("unet.c", "conv", 6, 5, (3, 3), (stride, stride), (1, 1))
    options = LoconOptions(rank=4, conv_rank=2, conv_alpha=3.0, tucker=True)
    theirs = LoConModule("c", layer, 1.0, 2, 3.0, use_tucker=True).double()
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.uniform(-1, 1, shape)  # noqa: E731
    arrays = network.initial(options, site, draw, lambda: np.empty(0))
    held = {word: torch.from_numpy(array) for word, array in arrays.items()}
    held["up"] = torch.from_numpy(rng.normal(size=(5, 2)))
    scale = options.scale_at(site)
    tensors = network.export(held, site, scale)
    # their own reader of files
    theirs.load_state_dict({**tensors, "alpha": tensors["alpha"].double()}, strict=False)
    assert theirs.scale == scale
    x = torch.from_numpy(rng.normal(size=(2, 6, 8, 8)))
    base = layer(x).detach()
    found = network.forward(held, Call(x, base, scale, 1.0, site, layer))
    theirs.apply_to()
    assert_close(found, layer(x).detach(), rtol=0, atol=1e-12)


def test_tuckers_form_is_for_convolutions_larger_than_1x1():
    options = LoconOptions(rank=4, tucker=True)
    for site, words in ((LINEAR, {"down", "up"}), (SMALL, {"down", "up"})):
        held = network.initial(options, site, np.ones, lambda: np.empty(0))
        assert held.keys() == words
    held = network.initial(options, LARGE, np.ones, lambda: np.empty(0))
    assert {word: array.shape for word, array in held.items()} == {
        "down": (4, 40),
        "mid": (4, 4, 3, 3),
        "up": (30, 4),
    }
    with pytest.raises(ValidationError, match="three factors have no principal start"):
        LoconOptions(tucker=True, start="pissa")


def test_tuckers_form_is_up_to_five_times_smaller_on_3x3_layers():
    wide = Site("unet.c", "conv", 1280, 1280, kernel=(3, 3), padding=(1, 1))
    sizes = []
    for tucker in (False, True):
        options = LoconOptions(rank=4, tucker=tucker)
        held = network.initial(options, wide, np.zeros, lambda: np.zeros(()))
        sizes.append(sum(array.size for array in held.values()))
    assert 4.5 < sizes[0] / sizes[1] < 5
