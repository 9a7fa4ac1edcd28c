"""LoRA files as diffusers reads them, and as it then applies them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import SD15, SHAPES, TINY_BASE, random_module, raw_bytes
from torch.testing import assert_close

from raylora.adapt.deltas import delta
from raylora.adapt.diffusers_reader import read_with_diffusers
from raylora.adapt.keys import layer_at
from raylora.adapt.lora_file import read_adapter


@pytest.mark.slow
@pytest.mark.parametrize("odd", ["attn", "mlp", "resnets", "layers.0", "down_blocks", "none"])
def test_scales_are_those_that_peft_really_applies(odd: str, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    modules = [
        random_module(name, shape, rank=2 + index % 3, alpha=3.0 if odd in name else 1.0)
        for index, (name, shape) in enumerate(SHAPES.items())
    ]
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_bytes(modules))
    reading = read_with_diffusers(path, SD15, read_adapter(path))
    pipeline = StableDiffusionPipeline.from_pretrained(str(TINY_BASE), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # peft tells of the patterns it ignores
        pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    components = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    for module in modules:
        layer: Any = layer_at(components[module.name.partition(".")[0]], module.name)
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
    ours = read_adapter(path)
    theirs = read_with_diffusers(path, SD15, ours)
    assert len(ours.modules) == len(theirs.modules) > 10
    for name, pair in theirs.modules.items():
        layer: Any = layer_at(pipeline.unet, name)
        halves = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        wanted = delta(*halves, layer.scaling["default"])
        assert theirs.loaded_scales[name] == layer.scaling["default"]
        assert_close(delta(*pair), wanted, rtol=0, atol=0)
        assert_close(ours.delta(name), wanted, rtol=0, atol=0)
    assert theirs.problems == []
