"""Comparing what a reader found with what was trained."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import SHAPES, TINY_BASE, as_trained, random_adapter, random_module
from torch.testing import assert_close

from raylora.adapt.deltas import LowRank, at_scale, delta
from raylora.adapt.keys import find_module, kohya_name
from raylora.adapt.lora_file import DOWN, UP, read_adapter, write_adapter
from raylora.adapt.proof_worker import compare, read_with_diffusers, rounding_bound

TRAINED = as_trained(random_adapter())
NAMES = list(SHAPES)


def rounded(pair: LowRank, dtype: torch.dtype) -> LowRank:
    down, up, scale = pair
    return down.to(dtype), up.to(dtype), scale


def test_the_same_weights_pass() -> None:
    found = compare(TRAINED, TRAINED)
    assert found.problems == ()
    assert found.modules == len(SHAPES)
    assert found.worst < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 1.0, 100.0])
def test_rounding_to_the_files_dtype_is_within_the_bound(dtype: torch.dtype, size: float) -> None:
    # Small sizes fall among float16's subnormals, where rounding is absolute.
    for seed in range(5):
        down, up, scale = random_module("m", (40, 30), seed=seed).low_rank
        pair = (down, up * size, scale)
        moved = float((delta(*rounded(pair, dtype)) - delta(*pair)).norm())
        bound = rounding_bound(pair, dtype)
        assert moved <= bound
        unit = torch.finfo(dtype).eps / 2
        if size >= 1e-3:
            # Frobenius norms multiply to some twice ‖ΔW‖ at rank 4, so no looser than 8 roundings.
            assert bound <= 8 * unit * float(delta(*pair).norm())


def test_a_bound_is_too_tight_for_a_scale_off_by_a_hundredth() -> None:
    for dtype in (torch.float32, torch.float16):
        down, up, scale = rounded(TRAINED[NAMES[0]], dtype)
        found = compare({NAMES[0]: (down, up, scale * 1.01)}, {NAMES[0]: TRAINED[NAMES[0]]})
        assert found.problems == (f"ΔW differs: {NAMES[0]} by 1.0%",)


def test_missing_and_extra_modules_are_named() -> None:
    read = dict(TRAINED)
    read["unet.other"] = read.pop(NAMES[1])
    assert compare(read, TRAINED).problems == (
        f"missing from the file: {NAMES[1]}",
        "in the file but never trained: unet.other",
    )


def test_the_worst_modules_are_named_first_and_the_rest_counted() -> None:
    read = {
        name: (down, up * (1 + (index + 1) / 10), scale)
        for index, (name, (down, up, scale)) in enumerate(TRAINED.items())
    }
    found = compare(read, TRAINED)
    assert found.worst_module == NAMES[-1]
    assert found.worst == pytest.approx(0.9, rel=1e-6)
    assert found.problems[0].startswith(f"ΔW differs: {NAMES[-1]} by 90.0%, {NAMES[-2]} by 80.0%")
    assert found.problems[0].endswith("and 4 more")


def test_another_shape_nan_and_a_module_that_should_do_nothing_are_faults() -> None:
    down, up, scale = TRAINED[NAMES[0]]
    for read in ((down.T, up, scale), (down[:, :3], up, scale), (down * math.nan, up, scale)):
        found = compare({NAMES[0]: read}, {NAMES[0]: (down, up, scale)})
        assert found.problems
        assert not found.worst <= 1
    nothing = (down, torch.zeros_like(up), scale)
    assert compare({NAMES[0]: (down, up, scale)}, {NAMES[0]: nothing}).problems
    assert compare({NAMES[0]: nothing}, {NAMES[0]: nothing}).problems == ()


def test_a_fresh_adapter_passes_since_up_is_zero() -> None:
    fresh = {
        module.name: (module.tensors[DOWN], torch.zeros_like(module.tensors[UP]), 0.5)
        for module in random_adapter()
    }
    assert compare(fresh, fresh).worst == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 40.0])
def test_halves_folded_to_another_scale_and_rounded_are_within_the_bound(
    dtype: torch.dtype, size: float, scale: float
) -> None:
    for seed in range(3):
        down, up, own = random_module("m", (40, 30), seed=seed).low_rank
        pair = (down, up * size, own)
        read = rounded(at_scale(pair, scale), dtype)
        assert compare({"m": read}, {"m": pair}).problems == ()
        off = (read[0], read[1] * (1 + 30 * torch.finfo(dtype).eps), scale)
        if size >= 1e-3:
            assert compare({"m": off}, {"m": pair}).problems


def test_a_module_that_adds_nothing_may_be_there_besides() -> None:
    down, up, scale = TRAINED[NAMES[0]]
    nothing = (torch.zeros_like(down), torch.zeros_like(up), scale)
    assert compare({**TRAINED, "unet.other": nothing}, TRAINED).problems == ()
    for wrong in ((down, up, scale), (down * math.nan, up, scale)):
        assert compare({**TRAINED, "unet.other": wrong}, TRAINED).problems


@pytest.mark.slow
@pytest.mark.parametrize("odd", ["attn", "mlp", "resnets", "layers.0", "down_blocks", "none"])
def test_scales_are_those_that_peft_really_applies(odd: str, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    modules = [
        random_module(name, shape, rank=2 + index % 3, alpha=3.0 if odd in name else 1.0)
        for index, (name, shape) in enumerate(SHAPES.items())
    ]
    write_adapter(tmp_path / "a.safetensors", modules, {}, dtype=torch.float32)
    reading = read_with_diffusers(tmp_path / "a.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(str(TINY_BASE), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # peft tells of the patterns it ignores
        pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    components = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    for module in modules:
        layer: Any = find_module(components, module.name)
        assert reading.loaded_scales[module.name] == layer.scaling["default_0"]
        assert reading.modules[module.name][2] == module.low_rank[2]


@pytest.mark.slow
def test_the_settings_in_a_file_of_diffusers_own_are_read_as_diffusers_reads_them(
    tmp_path: Path,
) -> None:
    # A file as a training script of diffusers leaves it: peft's weights and peft's settings.
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(str(TINY_BASE), dtype=torch.float32)
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["to_q", "conv1"], alpha_pattern={"conv1": 3}
    )
    pipeline.unet.add_adapter(config, adapter_name="default")
    for name, weight in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    ours, theirs = read_adapter(path), read_with_diffusers(path)
    assert len(ours.modules) == len(theirs.modules) > 10
    for name, pair in theirs.modules.items():
        layer: Any = find_module({"unet": pipeline.unet}, name)
        halves = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        wanted = delta(*halves, layer.scaling["default"])
        assert theirs.loaded_scales[name] == layer.scaling["default"]
        assert_close(delta(*pair), wanted, rtol=0, atol=0)
        assert_close(ours.delta(kohya_name(name)), wanted, rtol=0, atol=0)
    assert theirs.problems == []
