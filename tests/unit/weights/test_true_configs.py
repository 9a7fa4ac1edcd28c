"""The usual bases in full size, on the meta device."""

from __future__ import annotations

from functools import cache
from typing import Any

import originals
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    infer_diffusers_model_type,
)
from torch import Tensor

from raylora.weights.original_names import flux_weights, sd3_weights, unet_weights, vae_weights
from raylora.weights.recognise import recognise
from raylora.weights.short_names import SHORT_NAMES
from raylora.weights.true_configs import true_configs

DENOISERS = {
    "sd15": ("unet", 859.52, "v1"),
    "sd21": ("unet", 865.91, "v2"),
    "sdxl": ("unet", 2567.46, "xl_base"),
    "sd3-medium": ("transformer", 2028.33, "sd3"),
    "sd3.5-medium": ("transformer", None, "sd35_medium"),
    "sd3.5-large": ("transformer", None, "sd35_large"),
    "flux-dev": ("transformer", 11901.41, "flux-dev"),
    "flux-schnell": ("transformer", 11891.18, "flux-schnell"),
}
"""The denoiser, its millions of parameters, and what diffusers calls such a checkpoint."""


@cache
def state(name: str, component: str) -> dict[str, Tensor]:
    """Of a model with the true config, without memory."""
    import diffusers
    import transformers

    config = true_configs(name)[component]
    with torch.device("meta"):
        if component.startswith("text_encoder"):
            of = transformers.T5Config if "d_model" in config else transformers.CLIPTextConfig
            made: Any = getattr(transformers, config["architectures"][0])(of.from_dict(config))
        else:
            made = getattr(diffusers, config["_class_name"]).from_config(config)
    held: dict[str, Tensor] = made.state_dict()
    return held


def original(name: str) -> dict[str, Tensor]:
    """The denoiser by its makers' names, as a checkpoint has them."""
    held = state(name, DENOISERS[name][0])
    kind = SHORT_NAMES[name].kind
    if kind == "flux1":
        return originals.flux(held)
    return originals.sd3(held) if kind == "sd3" else originals.unet(held, deep=2)


def shapes(held: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in held.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", DENOISERS)
def test_a_true_checkpoint_is_recognised_as_what_it_is(name: str):
    component, _, called = DENOISERS[name]
    kind = SHORT_NAMES[name].kind
    tensors = originals.below("model.diffusion_model.", original(name))
    if name == "sdxl":
        second = originals.open_clip(state(name, "text_encoder_2"))
        tensors |= originals.below("conditioner.embedders.1.model.", second)
    assert infer_diffusers_model_type(dict(tensors)) == called
    found = recognise("it", tensors, {}, kind)
    assert found.usual == name
    assert found.kind == kind
    config = true_configs(name)[component]
    changed = config | found.changes.get(component, {})
    assert changed == config


@pytest.mark.slow
@pytest.mark.parametrize("name", DENOISERS)
def test_a_true_checkpoint_has_every_weight_of_the_denoiser(name: str):
    component, millions, _ = DENOISERS[name]
    held, kind = state(name, component), SHORT_NAMES[name].kind
    if millions is not None:
        count = sum(one.numel() for word, one in held.items() if not word.endswith(".pos_embed"))
        assert count / 1e6 == pytest.approx(millions, abs=0.006)
    read = {"flux1": flux_weights, "sd3": sd3_weights}.get(kind)
    config = true_configs(name)[component]
    found = read(original(name)) if read else unet_weights(original(name), config)
    assert shapes(found) == shapes(held)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "sd3.5-large", "flux-dev"])
def test_transformers_are_cut_where_diffusers_converter_cuts_them(name: str):
    flux = SHORT_NAMES[name].kind == "flux1"
    ours, theirs = (
        (flux_weights, convert_flux_transformer_checkpoint_to_diffusers)
        if flux
        else (sd3_weights, convert_sd3_transformer_checkpoint_to_diffusers)
    )
    assert shapes(ours(original(name))) == shapes(theirs(original(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", DENOISERS)
def test_true_vaes_and_text_encoders_have_their_size(name: str):
    configs = true_configs(name)
    vae = state(name, "vae")
    sizes = {"vae": 83.65 if configs["vae"]["latent_channels"] == 4 else 83.82}
    assert shapes(vae_weights(originals.vae(vae, 4), configs["vae"])) == shapes(vae)
    sizes["text_encoder"] = {"sd21": 340.39}.get(name, 123.06)
    if SHORT_NAMES[name].kind in ("sdxl", "sd3"):
        sizes["text_encoder_2"] = 694.66
    sizes["text_encoder_2" if "flux" in name else "text_encoder_3"] = 4762.31
    for component in configs:
        if component in sizes and "scheduler" not in component:
            held = state(name, component)
            named = {word for word in held if "embed_tokens" not in word}
            count = sum(held[word].numel() for word in named)
            if SHORT_NAMES[name].kind == "sd3" and component == "text_encoder":
                count -= held["text_projection.weight"].numel()
            assert count / 1e6 == pytest.approx(sizes[component], abs=0.006), component


def test_every_short_name_has_configs_of_its_family():
    for name, known in SHORT_NAMES.items():
        configs = true_configs(name)
        assert ("transformer" in configs) == (known.kind in ("sd3", "flux1"))
        assert {"vae", "scheduler", "text_encoder"} <= configs.keys()
