"""LoRA and LoCon against peft and against lycoris: outputs, and gradients of inputs and weights."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from adapters import fresh_adapter
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.adapt.attach import Adapter, Attachment
from raylora.families import site_of
from raylora.networks import get_network
from raylora.networks.locon import LoconOptions

RANK, ALPHA, CONV_RANK, CONV_ALPHA = 3, 1.5, 2, 5.0
ROUNDING = 1e-12  # float64 in another order


class Layers(nn.Module):
    """One of each kind of layer that SD 1.x has, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        double = {"dtype": torch.float64}
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1, **double)
        self.sampler = nn.Conv2d(6, 6, 3, stride=2, padding=1, **double)
        self.shortcut = nn.Conv2d(6, 8, 1, **double)
        self.proj = nn.Linear(8, 7, bias=False, **double)
        with torch.no_grad():
            for number, weight in enumerate(self.parameters()):
                weight.copy_(normal(number, *weight.shape))
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = torch.tanh(self.sampler(torch.tanh(self.conv1(pixels))))
        tokens: Tensor = self.proj(torch.tanh(self.shortcut(hidden)).flatten(2).mT)
        return tokens


NAMES = ["conv1", "sampler", "shortcut", "proj"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def ours() -> tuple[nn.Module, Adapter]:
    model = Layers()
    sites = [site_of(f"toy.{name}", model.get_submodule(name)) for name in NAMES]
    options = LoconOptions(rank=RANK, alpha=ALPHA, conv_rank=CONV_RANK, conv_alpha=CONV_ALPHA)
    adapter = fresh_adapter(
        get_network("locon"),
        options,
        [site for site in sites if site],
        seed=1,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        adapter.values += 0.3 * normal(9, *adapter.values.shape)
    Attachment(model, "toy", adapter)
    return model, adapter


def run(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(output, gradient of the input); gradients of weights are left where they belong."""
    pixels = normal(20, 2, 4, 6, 6).requires_grad_()
    output = model(pixels)
    (output * normal(21, *output.shape)).sum().backward()
    assert pixels.grad is not None
    return output.detach(), pixels.grad


def of_ours() -> tuple[tuple[Tensor, Tensor], dict[str, dict[str, Tensor]]]:
    model, adapter = ours()
    found = run(model)
    gradients = {
        name: {word: leaf.grad for word, leaf in adapter.parameters[f"toy.{name}"].items()}
        for name in NAMES
    }
    return found, gradients  # type: ignore[return-value]


def same(theirs: Any, half: Tensor) -> None:
    theirs.data.copy_(half.detach().view(theirs.shape))


@pytest.mark.slow
def test_locon_is_pefts_lora_with_patterns():
    from peft import LoraConfig, get_peft_model

    found, gradients = of_ours()
    _, adapter = ours()
    large = ["conv1", "sampler"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,  # type: ignore[arg-type]
            target_modules=NAMES,
            rank_pattern=dict.fromkeys(large, CONV_RANK),
            alpha_pattern=dict.fromkeys(large, CONV_ALPHA),
        )
        model = get_peft_model(Layers(), config)  # type: ignore[arg-type]
    model.double()
    layers = {name: model.base_model.model.get_submodule(name) for name in NAMES}
    for name, layer in layers.items():
        held = adapter.parameters[f"toy.{name}"]
        same(layer.lora_A["default"].weight, held["down"])
        same(layer.lora_B["default"].weight, held["up"])
    assert_close(run(model), found, rtol=0, atol=ROUNDING)
    for name, layer in layers.items():
        down, up = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        expected = gradients[name]
        assert_close(down.view(expected["down"].shape), expected["down"], rtol=0, atol=ROUNDING)
        assert_close(up.view(expected["up"].shape), expected["up"], rtol=0, atol=ROUNDING)


@pytest.mark.slow
def test_locon_is_that_of_lycoris():
    from lycoris.modules.locon import LoConModule

    found, gradients = of_ours()
    _, adapter = ours()
    model = Layers()
    layers = {}
    for name in NAMES:
        large = name in ("conv1", "sampler")
        rank, alpha = (CONV_RANK, CONV_ALPHA) if large else (RANK, ALPHA)
        layer = LoConModule(name, model.get_submodule(name), 1.0, rank, alpha).double()
        held = adapter.parameters[f"toy.{name}"]
        same(layer.lora_down.weight, held["down"])
        same(layer.lora_up.weight, held["up"])
        layer.apply_to()
        layers[name] = layer
    assert_close(run(model), found, rtol=0, atol=ROUNDING)
    for name, layer in layers.items():
        for word, half in (("down", layer.lora_down), ("up", layer.lora_up)):
            expected = gradients[name][word]
            assert_close(half.weight.grad.view(expected.shape), expected, rtol=0, atol=ROUNDING)
