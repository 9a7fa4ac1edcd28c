"""LoRAs that become part of a base."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapters import random_module
from torch import nn
from torch.testing import assert_close

from raylora.adapt.keys import Naming
from raylora.adapt.lora_file import AdapterFile, adapter_bytes, read_adapter
from raylora.adapt.merge import file_parts, merge_lora
from raylora.base.errors import WeightsError

SHAPES: dict[str, tuple[int, ...]] = {
    "unet.mid.conv": (5, 4, 3, 3),
    "unet.mid.proj_in": (6, 5, 1, 1),
    "unet.mid.to_q": (3, 6),
    "text_encoder.text_model.mlp.fc1": (4, 3),
}


class Level(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def unet() -> nn.Module:
    torch.manual_seed(0)
    mid = {"conv": nn.Conv2d(4, 5, 3), "proj_in": nn.Conv2d(5, 6, 1), "to_q": nn.Linear(6, 3)}
    return Level(mid=Level(**mid), other=nn.Linear(2, 2))


def text_encoder(*, level: bool) -> nn.Module:
    torch.manual_seed(1)
    inner = Level(mlp=Level(fc1=nn.Linear(3, 4)))
    return Level(text_model=inner) if level else inner


def file(naming: Naming = "kohya", **shapes: tuple[int, ...]) -> AdapterFile:
    modules = [
        random_module(name, shape, rank=2, alpha=3.0, seed=seed)
        for seed, (name, shape) in enumerate((shapes or SHAPES).items())
    ]
    return read_adapter(adapter_bytes(modules, {}, dtype=torch.float32, naming=naming))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("strength", [1.0, 0.25, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_times_delta_is_added_in_float64_and_rounded_once(
    naming: Naming, strength: float, dtype: torch.dtype
) -> None:
    model, held = unet().to(dtype), file(naming)
    before = weights(model)
    pointers = [weight.data_ptr() for weight in model.parameters()]
    assert merge_lora("unet", model, held, strength) == 3
    assert [weight.data_ptr() for weight in model.parameters()] == pointers  # in place
    for name, after in weights(model).items():
        added = torch.zeros(())
        if name.startswith("mid.") and name.endswith("weight"):
            module = held.modules[f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"]
            down, up, scale = module.low_rank
            added = strength * scale * torch.tensordot(up.double().flatten(1), down.double(), 1)
            assert added.abs().max() > 0
        assert_close(after, (before[name].double() + added).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("level", [True, False])
def test_a_text_encoder_is_found_with_and_without_its_extra_level(level: bool) -> None:
    model, held = text_encoder(level=level), file()
    before = weights(model)
    assert merge_lora("text_encoder", model, held, 2.0) == 1
    (name,) = (name for name in before if name.endswith("weight"))
    wanted = before[name].double() + 2 * held.delta("lora_te_text_model_mlp_fc1")
    assert_close(model.state_dict()[name], wanted.float(), rtol=0, atol=0)


def test_a_1x1_convolution_and_a_linear_layer_take_each_others_file() -> None:
    model = Level(mid=Level(proj_in=nn.Linear(5, 6), to_q=nn.Conv2d(6, 3, 1)))
    held = file(**{name: SHAPES[name] for name in ("unet.mid.proj_in", "unet.mid.to_q")})
    before = weights(model)
    assert merge_lora("unet", model, held, 1.0) == 2
    moved = model.state_dict()["mid.proj_in.weight"].double() - before["mid.proj_in.weight"]
    wanted = held.delta("lora_unet_mid_proj_in")[:, :, 0, 0]
    assert_close(moved, wanted, rtol=0, atol=1e-7)  # float32 of numbers below 1


def test_the_models_that_a_file_changes_are_named() -> None:
    assert file_parts(file()) == {"unet", "text_encoder"}
    assert file_parts(file(**{"unet.mid.to_q": (3, 6)})) == {"unet"}


def test_a_file_for_another_family_is_refused_by_name_and_changes_nothing() -> None:
    model = unet()
    before = weights(model)
    foreign = file(**{"unet.mid.to_q": (3, 6)})
    module = foreign.modules["lora_unet_mid_to_q"]
    foreign.modules["lora_te2_text_model_a"] = replace(module, name="lora_te2_text_model_a")
    with pytest.raises(WeightsError, match="lora_te2_text_model_a: no layer of Stable Diffusion"):
        merge_lora("unet", model, foreign, 1.0)
    with pytest.raises(WeightsError, match="lora_te2_text_model_a"):
        file_parts(foreign)
    unknown = file(**{"unet.mid.to_q": (3, 6), "unet.zzz.attn": (3, 6)})
    with pytest.raises(WeightsError, match="lora_unet_zzz_attn: the base has no such layer"):
        merge_lora("unet", model, unknown, 1.0)
    wider = file(**{"unet.mid.to_q": (3, 6), "unet.mid.conv": (5, 4, 1, 1)})
    with pytest.raises(WeightsError, match=r"shape \(5, 4, 1, 1\), and the base has \(5, 4, 3, 3"):
        merge_lora("unet", model, wider, 1.0)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name])
