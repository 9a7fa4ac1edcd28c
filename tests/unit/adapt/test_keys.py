"""Names of layers: raylora's, the LoRA file's, diffusers'."""

from __future__ import annotations

import pytest
from adapters import SD15_MODULES, SHAPES, sd15_components
from torch import nn

from raylora.adapt.keys import (
    find_module,
    kohya_name,
    kohya_to_module,
    module_name,
    module_names,
    peft_key,
    split_peft_key,
)
from raylora.base.errors import WeightsError


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        ),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
        ),
        ("unet.up_blocks.1.attentions.2.proj_in", "lora_unet_up_blocks_1_attentions_2_proj_in"),
        (
            "text_encoder.text_model.encoder.layers.11.self_attn.q_proj",
            "lora_te_text_model_encoder_layers_11_self_attn_q_proj",
        ),
    ],
)
def test_a_layer_is_named_as_sd_scripts_names_it_and_back(ours: str, theirs: str) -> None:
    assert kohya_name(ours) == theirs
    assert kohya_to_module(theirs, [ours, *SHAPES]) == ours


def test_a_name_from_a_file_stays_as_it_is() -> None:
    assert (
        kohya_name("lora_unet_mid_block_resnets_0_conv1") == "lora_unet_mid_block_resnets_0_conv1"
    )


def test_a_component_without_a_name_in_files_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"begin with one of unet\., text_encoder\."):
        kohya_name("vae.decoder.conv_in")


def test_a_layer_the_base_lacks_is_refused() -> None:
    with pytest.raises(
        WeightsError, match="lora_unet_double_blocks_0_img_attn_qkv: the base has no"
    ):
        kohya_to_module("lora_unet_double_blocks_0_img_attn_qkv", SHAPES)


@pytest.mark.parametrize(
    "path", ["encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"]
)
def test_the_text_encoders_name_is_the_same_with_and_without_its_extra_level(path: str) -> None:
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    assert module_name("text_encoder", path) == name
    layer = nn.Linear(2, 2)
    model = nn.Module()
    level = model
    for word in path.split(".")[:-1]:
        level.add_module(word, nn.Module())
        level = level.get_submodule(word)
    level.add_module("fc1", layer)
    assert module_names("text_encoder", model) == [name]
    assert find_module({"text_encoder": model}, name) is layer


def test_a_missing_layer_or_component_is_named() -> None:
    with pytest.raises(WeightsError, match=r"unet\.conv_in: the base has no such layer"):
        find_module({"unet": nn.Module()}, "unet.conv_in")
    with pytest.raises(WeightsError, match="no such layer"):
        find_module({}, "unet.conv_in")


def test_diffusers_keys_come_back() -> None:
    name = "unet.mid_block.attentions.0.proj_in"
    assert peft_key(name, "down") == f"{name}.lora_A.weight"
    assert split_peft_key(peft_key(name, "up")) == (name, "up")
    with pytest.raises(WeightsError, match="not half of a LoRA"):
        split_peft_key("unet.conv_in.weight")


@pytest.mark.slow
@pytest.mark.parametrize("network", SD15_MODULES)
def test_every_sd15_name_and_shape_of_sd_scripts_is_a_layer_of_the_real_model(network: str) -> None:
    components = sd15_components()
    known = [name for word, model in components.items() for name in module_names(word, model)]
    assert len({kohya_name(name) for name in known}) == len(known)  # no two layers share a name
    for kohya, (down, up, alpha) in SD15_MODULES[network].items():
        name = kohya_to_module(kohya, known)
        assert kohya_name(name) == kohya
        outputs, *inputs = find_module(components, name).weight.shape
        assert down == [4, *inputs]
        assert up == [outputs, 4, *[1 for _ in inputs[1:]]]
        assert alpha == 2.0
