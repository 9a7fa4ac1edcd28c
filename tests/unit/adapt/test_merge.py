"""LoRAs that become part of a base."""

from __future__ import annotations

import pytest
import torch
from adapters import SD15, file_bytes, random_module, site_of_module
from torch import nn
from torch.testing import assert_close

from raylora.adapt.deltas import delta
from raylora.adapt.keys import Naming
from raylora.adapt.lora_file import AdapterModule, adapter_bytes, read_adapter
from raylora.adapt.merge import Fitted, file_parts, fitted, merge_lora
from raylora.base.errors import WeightsError
from raylora.base.site import Site

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


def modules(**shapes: tuple[int, ...]) -> list[AdapterModule]:
    return [
        random_module(name, shape, rank=2, alpha=3.0, seed=seed)
        for seed, (name, shape) in enumerate((shapes or SHAPES).items())
    ]


SITES = [site_of_module(module) for module in modules()]


def file(naming: Naming = "kohya", sites: list[Site] = SITES, **shapes: tuple[int, ...]) -> Fitted:
    held = read_adapter(file_bytes(modules(**shapes), naming=naming))
    return fitted(held, sites, SD15)


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
            module = held[f"unet.{name.removesuffix('.weight')}"]
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
    wanted = before[name].double() + 2 * delta(*held["text_encoder.text_model.mlp.fc1"].low_rank)
    assert_close(model.state_dict()[name], wanted.float(), rtol=0, atol=0)


def test_a_1x1_convolution_and_a_linear_layer_take_each_others_file() -> None:
    model = Level(mid=Level(proj_in=nn.Linear(5, 6), to_q=nn.Conv2d(6, 3, 1)))
    held = file(**{name: SHAPES[name] for name in ("unet.mid.proj_in", "unet.mid.to_q")})
    before = weights(model)
    assert merge_lora("unet", model, held, 1.0) == 2
    moved = model.state_dict()["mid.proj_in.weight"].double() - before["mid.proj_in.weight"]
    wanted = delta(*held["unet.mid.proj_in"].low_rank)[:, :, 0, 0]
    assert_close(moved, wanted, rtol=0, atol=1e-7)  # float32 of numbers below 1


def test_the_models_that_a_file_changes_are_named() -> None:
    assert file_parts(file()) == {"unet", "text_encoder"}
    assert file_parts(file(**{"unet.mid.to_q": (3, 6)})) == {"unet"}


def test_a_file_for_another_family_or_base_is_refused() -> None:
    foreign = adapter_bytes(
        [AdapterModule("lora_te2_text_model_a", modules()[0].tensors)], {}, dtype=torch.float32
    )
    with pytest.raises(WeightsError, match="is for SDXL or Stable Diffusion 3"):
        fitted(read_adapter(foreign), SITES, SD15)
    with pytest.raises(WeightsError, match=r"no such layer for 1 modules .*lora_unet_zzz_attn"):
        file(**{"unet.mid.to_q": (3, 6), "unet.zzz.attn": (3, 6)})
    with pytest.raises(WeightsError, match="a weight of 5 x 4 x 1 x 1, the base's of 5 x 4 x 3"):
        file(**{"unet.mid.to_q": (3, 6), "unet.mid.conv": (5, 4, 1, 1)})


def test_a_change_that_depends_on_the_weight_is_taken_from_the_weight() -> None:
    model = unet().double()
    before = weights(model)["mid.to_q.weight"]
    numbers = torch.tensor([0.5, -1.0, 0.25])
    scaled = AdapterModule("unet.mid.to_q", {"weight": numbers, "on_input": torch.tensor(0)})
    assert merge_lora("unet", model, {"unet.mid.to_q": scaled}, 2.0) == 1
    wanted = before * (1 + 2 * numbers.double()[:, None])
    assert_close(weights(model)["mid.to_q.weight"], wanted, rtol=1e-15, atol=0)


def test_a_bias_is_changed_too_and_missed_where_the_base_has_none() -> None:
    model = unet().double()
    before = weights(model)["mid.to_q.bias"]
    full = AdapterModule("unet.mid.to_q", {"diff": torch.zeros(3, 6), "diff_b": torch.ones(3)})
    merge_lora("unet", model, {"unet.mid.to_q": full}, 0.5)
    assert_close(weights(model)["mid.to_q.bias"], before + 0.5, rtol=0, atol=0)
    bare = Level(mid=Level(to_q=nn.Linear(6, 3, bias=False)))
    with pytest.raises(WeightsError, match="changes a bias, and the base's layer has none"):
        merge_lora("unet", bare, {"unet.mid.to_q": full}, 0.5)
