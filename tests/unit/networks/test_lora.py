"""LoRA itself: its first weights, its formula, its file. What all networks do is in contract/."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from raylora.base.errors import OptionError
from raylora.base.site import Site
from raylora.networks import get_network
from raylora.networks.lora import LoraOptions, export, forward, initial

LINEAR = Site("unet.q", "linear", 40, 30)
CONV = Site("unet.p", "conv", 40, 30)


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_first_weights_are_uniform_within_one_over_root_of_inputs_and_zero():
    held = initial(LoraOptions(rank=500), LINEAR, draw)
    bound = 1 / np.sqrt(40)
    assert held["down"].shape == (500, 40)
    assert 0.99 * bound < abs(held["down"]).max() <= bound
    assert held["down"].std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    # torch's kaiming_uniform_(a=sqrt(5)), by which sd-scripts and peft begin
    theirs = torch.empty(500, 40)
    torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)
    assert float(theirs.abs().max()) == pytest.approx(abs(held["down"]).max(), rel=0.01)
    assert held["up"].shape == (30, 500)
    assert not held["up"].any()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_output_is_base_plus_scale_times_up_of_down(scale: float):
    down, up = normal(0, 3, 40), normal(1, 30, 3)
    x, base = normal(2, 2, 5, 40), normal(3, 2, 5, 30)
    found = forward({"down": down, "up": up}, x, base, scale, LINEAR)
    assert_close(found, base + scale * (x @ down.T) @ up.T, rtol=0, atol=1e-12)
    pixels, base = normal(4, 2, 40, 3, 4), normal(5, 2, 30, 3, 4)
    found = forward({"down": down, "up": up}, pixels, base, scale, CONV)
    expected = base + scale * torch.einsum("or,ri,bihw->bohw", up, down, pixels)
    assert_close(found, expected, rtol=0, atol=1e-12)


def test_inputs_that_are_not_contiguous_are_taken():
    down, up = normal(0, 3, 40), normal(1, 30, 3)
    x, base = normal(2, 40, 5, 2).permute(2, 1, 0), normal(3, 30, 5, 2).permute(2, 1, 0)
    found = forward({"down": down, "up": up}, x, base, 1.0, LINEAR)
    assert_close(found, base + (x @ down.T) @ up.T, rtol=0, atol=1e-12)
    pixels, base = (normal(seed, 3, 4, 2, n).permute(2, 3, 0, 1) for seed, n in ((4, 40), (5, 30)))
    found = forward({"down": down, "up": up}, pixels, base, 1.0, CONV)
    expected = base + torch.einsum("or,ri,bihw->bohw", up, down, pixels)
    assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (8.0, 1.0), (2.0, 0.25), (16.0, 2.0)])
def test_strength_is_alpha_over_rank(alpha: float | None, scale: float):
    options = LoraOptions(rank=8, alpha=alpha)
    assert options.scale_at(LINEAR) == scale
    held = {"down": normal(0, 8, 40), "up": normal(1, 30, 8)}
    tensors = export(held, LINEAR, scale)
    assert float(tensors["alpha"]) == (alpha or 8.0)
    assert tensors["alpha"].dtype == torch.float32


def test_convolutions_have_four_dimensions_in_the_file():
    held = {"down": normal(0, 8, 40), "up": normal(1, 30, 8)}
    tensors = export(held, CONV, 1.0)
    assert tensors["lora_down.weight"].shape == (8, 40, 1, 1)
    assert tensors["lora_up.weight"].shape == (30, 8, 1, 1)
    assert export(held, LINEAR, 1.0)["lora_up.weight"].shape == (30, 8)


def test_wrong_options_are_refused():
    with pytest.raises(ValidationError):
        LoraOptions(rank=0)
    with pytest.raises(ValidationError):
        LoraOptions(alpha=-1)
    with pytest.raises(OptionError, match=r"'lroa' is not known\. Did you mean 'lora'\?"):
        get_network("lroa")
