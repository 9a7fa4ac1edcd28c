"""Which family a file is for, by names and sizes."""

from __future__ import annotations

import pytest
import torch

from raylora.adapt.lora_file import (
    DOWN,
    UP,
    AdapterFile,
    AdapterModule,
    adapter_bytes,
    read_adapter,
)
from raylora.adapt.recognise import families_of, refuse_others
from raylora.base.errors import WeightsError


def file(name: str, inputs: int = 8) -> AdapterFile:
    halves = {DOWN: torch.ones(1, inputs), UP: torch.ones(4, 1)}
    return read_adapter(adapter_bytes([AdapterModule(name, halves)], {}, dtype=torch.float32))


CROSS = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("name", "inputs", "families"),
    [
        (f"lora_unet_{CROSS}", 768, "sd15"),
        (f"lora_unet_{CROSS}", 1024, "sd2"),
        (f"lora_unet_{CROSS}", 2048, "sdxl"),
        (f"lora_unet_{CROSS}", 32, "sd15 sd2 sdxl"),
        ("unet.down_blocks.2.attentions.0.transformer_blocks.7.ff.net.2", 8, "sdxl"),
        ("lora_unet_input_blocks_4_1_proj_in", 8, "sdxl"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", 8, "sdxl sd3 flux1"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 768, "sd15"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 1024, "sd2"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 32, "sd15 sd2"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 768, "sdxl sd3 flux1"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", 8, "sd3"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv", 8, "sd3"),
        ("transformer.transformer_blocks.0.attn2.to_q", 8, "sd3"),
        ("transformer.transformer_blocks.0.attn.to_q", 1536, "sd3"),
        ("transformer.transformer_blocks.0.attn.add_k_proj", 3072, "flux1"),
        ("transformer.transformer_blocks.0.attn.to_q", 32, "sd3 flux1"),
        ("transformer.single_transformer_blocks.0.proj_mlp", 8, "flux1"),
        ("lora_transformer_single_transformer_blocks_0_proj_mlp", 8, "flux1"),
        ("lycoris_single_transformer_blocks_0_proj_mlp", 8, "flux1"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 8, "flux1"),
    ],
)
def test_names_and_widths_tell(name: str, inputs: int, families: str) -> None:
    assert families_of(file(name, inputs)) == set(families.split())


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", r"FLUX\.2"),
        ("lora_unet_distilled_guidance_layer_in_proj", "Chroma"),
        ("transformer.transformer_blocks.0.img_mlp.net.0.proj", "Qwen-Image"),
        ("diffusion_model.blocks.0.self_attn.q", "Wan"),
        ("diffusion_model.noise_refiner.0.attention.qkv", "Lumina or Z-Image"),
        ("transformer.transformer_blocks.0.adaln_single.linear", "PixArt or LTX"),
    ],
)
def test_a_file_for_a_model_that_raylora_does_not_train_is_refused_by_its_name(
    name: str, called: str
) -> None:
    with pytest.raises(WeightsError, match=f"is for {called}"):
        refuse_others(file(name), "flux1")


def test_both_families_are_named() -> None:
    with pytest.raises(WeightsError, match=r"is for SDXL, and the base is Stable Diffusion 1\.x"):
        refuse_others(file("lora_unet_input_blocks_4_1_proj_in"), "sd15")
    refuse_others(file("lora_unet_input_blocks_4_1_proj_in"), "sdxl")
