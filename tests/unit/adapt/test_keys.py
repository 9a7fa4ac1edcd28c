"""Names of layers: raylora's, the LoRA file's, diffusers'."""

from __future__ import annotations

import pytest
from adapters import SD15_MODULES, SHAPES, sd15_components
from torch import nn

from raylora.adapt.keys import (
    component_of,
    find_module,
    is_peft_key,
    kohya_name,
    kohya_to_module,
    layers_by_file_name,
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


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("unet.mid_block.resnets.0.conv1", "unet"),
        ("lora_unet_mid_block_resnets_0_conv1", "unet"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder"),
    ],
)
def test_the_model_of_a_layer_is_told_from_either_name(name: str, component: str) -> None:
    assert component_of(name) == component


@pytest.mark.parametrize("name", ["lora_te2_text_model_encoder_layers_0_mlp_fc1", "unetx.a", "vae"])
def test_a_model_of_another_family_is_refused(name: str) -> None:
    with pytest.raises(WeightsError, match=f"{name}: no layer of Stable Diffusion 1"):
        component_of(name)


def test_keys_of_diffusers_own_naming_are_told_from_others() -> None:
    assert is_peft_key("unet.a.b.lora_A.weight")
    assert is_peft_key("text_encoder.a.lora_B.weight")
    for key in ("lora_unet_a.lora_down.weight", "unet.a.weight", "vae.a.lora_A.weight", "unet"):
        assert not is_peft_key(key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "unet", "keys"),
    [("sd15_dim4_alpha2", 192, 792), ("sd15_dim4_alpha2_conv4_alpha2", 278, 1050)],
)
def test_the_layers_of_sd15_have_all_of_sd_scripts_names(
    network: str, unet: int, keys: int
) -> None:
    layers = {
        name
        for word, model in sd15_components().items()
        for name in layers_by_file_name(word, model)
    }
    theirs = SD15_MODULES[network]
    assert set(theirs) <= layers
    assert sum(component_of(name) == "unet" for name in theirs) == unet
    assert sum(component_of(name) == "text_encoder" for name in theirs) == 72
    assert 3 * len(theirs) == keys


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
