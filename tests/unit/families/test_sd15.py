"""SD 1.x: what is refused, and agreement with diffusers and with sd-scripts' choice of layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import SD15_MODULES, TINY_BASE, sd15_components
from torch.testing import assert_close

from raylora.adapt.keys import kohya_name
from raylora.base.errors import WeightsError
from raylora.families.sd15 import Sd15, Sd15Options

CPU = torch.device("cpu")


def opened(folder: Path = TINY_BASE) -> Sd15:
    return Sd15(folder, Sd15Options(weights=str(folder)))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The configs of the tiny base, to be spoiled."""
    for part in ("unet", "vae", "scheduler"):
        (tmp_path / part).mkdir()
        for file in (TINY_BASE / part).glob("*.json"):
            shutil.copy(file, tmp_path / part)
    return tmp_path


def change(file: Path, **words: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **words}))


def test_facts_of_the_tiny_base():
    family = opened()
    assert family.process.prediction == "v_prediction"
    assert family.metadata["modelspec.prediction_type"] == "v"
    assert (family.pixels_per_latent, family.latent_channels, family.size_step) == (4, 4, 16)


@pytest.mark.parametrize(
    ("file", "words", "sentence"),
    [
        ("unet/config.json", {"_class_name": "FluxTransformer2DModel"}, "sd15 needs a UNet2DCond"),
        ("vae/config.json", {"_class_name": "AutoencoderDC"}, "sd15 needs a AutoencoderKL"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "this is not Stable Diffusion"),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "sample"},
            "prediction_type 'sample'; sd15 knows epsilon and v_prediction",
        ),
        ("scheduler/scheduler_config.json", {"beta_schedule": "odd"}, "beta_schedule 'odd'"),
    ],
)
def test_a_base_of_another_kind_is_refused(base: Path, file: str, words: Any, sentence: str):
    change(base / file, **words)
    with pytest.raises(WeightsError, match=sentence):
        opened(base)


def test_a_torn_config_is_told(base: Path):
    (base / "unet/config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"is not JSON .* Fetch the file again"):
        opened(base)


@pytest.mark.slow
def test_pickled_weights_are_not_read(base: Path):
    (base / "unet/diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"Pickle weights \(.bin, .ckpt\) are not read"):
        opened(base).load_denoiser(dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(("layers", "rule"), [("attention_mlp", ""), ("attention", "_attn")])
def test_layers_are_those_of_sd_scripts(layers: str, rule: str):
    """On the UNet of SD 1.5 in full size, without memory for its weights."""
    unet = sd15_components()["unet"]
    sites = opened().sites(unet, layers)
    theirs = {
        name: (down, up)
        for name, (down, up, _) in next(iter(SD15_MODULES.values())).items()
        if name.startswith("lora_unet_") and rule in name
    }
    assert {kohya_name(site.name) for site in sites} == set(theirs)
    for site in sites:
        down, up = theirs[kohya_name(site.name)]
        assert (site.inputs, site.outputs) == (down[1], up[0])
        assert (site.kind == "conv") == (len(down) == 4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_denoiser_predicts_what_diffusers_does(dtype: torch.dtype):
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel.from_pretrained(TINY_BASE / "unet", dtype=dtype)
    ours = opened().load_denoiser(dtype=dtype, device=CPU)
    random = np.random.default_rng(0)
    latents = torch.from_numpy(random.normal(size=(2, 4, 8, 12))).to(dtype)
    text = torch.from_numpy(random.normal(size=(2, 77, 96))).to(dtype)
    timesteps = torch.tensor([3, 800])
    with torch.no_grad():
        expected = theirs(latents, timesteps, text).sample
        found = opened().predict(ours, latents, timesteps, {"text": text})
    assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.slow
def test_latents_and_captions_are_those_of_the_diffusers_pipeline():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        TINY_BASE, dtype=torch.float32, safety_checker=None
    )
    encoder = opened().load_encoder(device=CPU)
    caption = "ink icon, winking face, face"
    positive, negative = pipeline.encode_prompt(caption, CPU, 1, True, negative_prompt="")
    texts = encoder.encode_texts([caption, ""])["text"]
    assert_close(texts, torch.cat([positive, negative]).detach().numpy(), rtol=0, atol=1e-5)
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 64, 48)).astype(np.float32)
    with torch.no_grad():
        posterior = pipeline.vae.encode(torch.from_numpy(pixels)).latent_dist
    expected = (posterior.mode() * pipeline.vae.config.scaling_factor).numpy()
    found = encoder.encode_images(pixels)["latents"]
    assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_renderer_is_the_diffusers_pipeline():
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    family = opened()
    renderer = family.load_renderer(family.load_denoiser(dtype=torch.float32, device=CPU))
    latents = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 4, 12, 16))).float()
    ours = renderer.render("ink icon, cat", negative="red", latents=latents, steps=3, guidance=3.5)
    pipeline = StableDiffusionPipeline.from_pretrained(
        TINY_BASE, dtype=torch.float32, safety_checker=None
    )
    pipeline.scheduler = DDIMScheduler.from_pretrained(TINY_BASE / "scheduler")
    theirs = pipeline(
        "ink icon, cat",
        negative_prompt="red",
        height=48,
        width=64,
        latents=latents,
        num_inference_steps=3,
        guidance_scale=3.5,
        output_type="np",
    ).images[0]
    assert ours.shape == (48, 64, 3)
    assert abs(ours.astype(int) - (theirs * 255).round().astype(int)).max() <= 1
