"""The names in LoRA files, in every program's spelling."""

from __future__ import annotations

import pytest
import torch
from adapters import SD15_MODULES, kohya_name, sd15_components
from torch import nn

from raylora.adapt.keys import (
    WORDS,
    layer_at,
    spelling_of,
    split_key,
    with_text_level,
)

DOWN, UP = "lora_down.weight", "lora_up.weight"
ATTENTION = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("key", "name", "word"),
    [
        (f"lora_unet_mid_block.{DOWN}", "lora_unet_mid_block", DOWN),
        ("lora_te2_text_model_x.alpha", "lora_te2_text_model_x", "alpha"),
        ("lora_unet_a.dora_scale", "lora_unet_a", "dora_scale"),
        ("lora_unet_a.weight", "lora_unet_a", "weight"),
        ("lora_unet_a.a1.weight", "lora_unet_a", "a1.weight"),
        ("lycoris_transformer_blocks_0.lokr_w2_a", "lycoris_transformer_blocks_0", "lokr_w2_a"),
        (f"lora_transformer_proj_out.{UP}", "lora_transformer_proj_out", UP),
        ("transformer.proj_out.lora_A.weight", "transformer.proj_out", DOWN),
        ("text_encoder_2.a.lora_B.weight", "text_encoder_2.a", UP),
        ("unet.a.lora_magnitude_vector", "unet.a", "dora_scale"),
        ("base_model.model.a.b.lora_A.default.weight", "base_model.model.a.b", DOWN),
        ("base_model.model.a.b.lora_magnitude_vector.weight", "base_model.model.a.b", "dora_scale"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
         "diffusion_model.double_blocks.0.img_attn.qkv", DOWN),
        (f"diffusion_model.img_in.{DOWN}", "diffusion_model.img_in", DOWN),
        (f"text_encoders.clip_l.transformer.a.{UP}", "text_encoders.clip_l.transformer.a", UP),
        # diffusers' older spellings
        (f"{ATTENTION}.processor.to_q_lora.down.weight", f"{ATTENTION}.to_q", DOWN),
        (f"{ATTENTION}.processor.to_out_lora.up.weight", f"{ATTENTION}.to_out.0", UP),
        ("unet.a.lora.down.weight", "unet.a", DOWN),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight",
         "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", UP),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
         "text_encoder.text_model.encoder.layers.0.self_attn.out_proj", UP),
        ("text_encoder.a.mlp.fc1.lora_linear_layer.down.weight", "text_encoder.a.mlp.fc1", DOWN),
    ],
)  # fmt: skip
def test_a_key_is_told_apart_into_module_and_word(key: str, name: str, word: str) -> None:
    assert split_key(key) == (name, word)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "vae.a.lora_A.weight",
        "unet.lora_A.weight",
        "lora_unet_a.dora_magnitude",
        "lora_unet_a.b.alpha",  # kohya's names have no dots
        "oft_unet_a.oft_blocks",  # of sd-scripts' own OFT, which is another
        "alpha",
    ],
)
def test_what_is_no_adapters_key_is_nobodys(key: str) -> None:
    assert split_key(key) is None


def test_no_word_is_hidden_by_one_that_is_its_end() -> None:
    for word in WORDS:
        assert split_key(f"lora_unet_a.{word}") == ("lora_unet_a", word)


def test_each_spelling_is_known_by_its_beginning() -> None:
    found = {
        spelling_of(name)
        for name in (
            "lora_unet_a",
            "lycoris_a",
            "lora_transformer_a",
            "text_encoder_3.a",
            "diffusion_model.a",
            "base_model.model.a",
        )
    }
    assert found == {"kohya", "lycoris", "onetrainer", "diffusers", "comfyui", "peft"}
    assert spelling_of("text_encoder.") is None


@pytest.mark.parametrize("network", SD15_MODULES)
def test_sd_scripts_names_of_sd15_are_those_of_its_layers(network: str) -> None:
    components = sd15_components()
    names = {
        kohya_name(with_text_level(f"{component}.{path}"))
        for component, model in components.items()
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    assert set(SD15_MODULES[network]) <= names


def test_a_layer_is_found_with_and_without_the_level_that_transformers_5_leaves_out() -> None:
    with torch.device("meta"):
        inner = nn.ModuleDict({"fc1": nn.Linear(2, 3)})
        outer = nn.ModuleDict({"text_model": inner})
    for model, layer in ((inner, inner["fc1"]), (outer, inner["fc1"])):
        assert layer_at(model, "text_encoder.text_model.fc1") is layer


def test_a_name_without_that_level_gets_it() -> None:
    short, long = (
        "text_encoder_2.encoder.layers.0.a",
        "text_encoder_2.text_model.encoder.layers.0.a",
    )
    assert with_text_level(short) == with_text_level(long) == long
    t5 = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
    assert with_text_level(t5) == t5
