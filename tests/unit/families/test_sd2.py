"""SD 2.x: its layers in full size, its text, its metadata, and files that diffusers reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bases import random_folder
from safetensors.torch import save_file
from torch.testing import assert_close
from true_configs import SD15, SD21, Configured

from raylora.base.errors import WeightsError
from raylora.families.sd2 import Sd2, Sd2Options
from raylora.weights.base import open_base

CPU = torch.device("cpu")
USUAL = ("attention", "mlp", "projection")


def opened(folder: Path | None = None, **words: Any) -> Sd2:
    place = str(folder or random_folder("sd2"))
    return Sd2(open_base(place, kind="sd2"), Sd2Options(weights=place, **words))


def true_size(**scheduler: Any) -> Sd2:
    configs = {**SD21, "scheduler": {**SD21["scheduler"], **scheduler}}
    return Sd2(Configured(configs), Sd2Options(weights="x"))


@pytest.mark.slow
def test_in_full_size_its_layers_are_those_of_sd_scripts():
    family = true_size()
    denoiser, encoders = family.skeletons()
    sites = [site for site in family.sites(denoiser) if site.role in USUAL]
    texts = [site for site in family.text_sites(encoders) if site.role in USUAL]
    assert (len(sites), len(texts)) == (192, 138)
    names = {family.place(site.name).kohya for site in [*sites, *texts]}
    transformers = [
        *(f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)),
        "mid_block_attentions_0",
        *(f"up_blocks_{i}_attentions_{j}" for i in (1, 2, 3) for j in range(3)),
    ]
    inner = [
        *(f"attn{i}_{part}" for i in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out_0")),
        "ff_net_0_proj",
        "ff_net_2",
    ]
    unet = {
        f"lora_unet_{place}_{layer}"
        for place in transformers
        for layer in ("proj_in", "proj_out", *(f"transformer_blocks_0_{one}" for one in inner))
    }
    text = {
        f"lora_te_text_model_encoder_layers_{i}_{layer}"
        for i in range(23)
        for layer in (
            *(f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2",
        )
    }  # fmt: skip
    assert names == unet | text
    assert {site.kind for site in sites} == {"linear"}, "1.x has convolutions as projections"
    widths = {site.inputs for site in sites if site.name.endswith("attn2.to_k")}
    assert widths == {1024}


@pytest.mark.parametrize(
    ("prediction", "version", "architecture", "word"),
    [
        ("v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v", "v"),
        ("epsilon", "sd_v2", "stable-diffusion-v2-512", "epsilon"),
    ],
)
def test_the_files_header_tells_what_is_predicted(
    prediction: str, version: str, architecture: str, word: str
):
    family = true_size(prediction_type=prediction)
    assert family.process.prediction == prediction
    assert family.metadata == {
        "ss_base_model_version": version,
        "ss_v2": "True",
        "ss_sd_model_name": "true-size",
        "ss_clip_skip": "1",
        "modelspec.architecture": architecture,
        "modelspec.prediction_type": word,
    }


def test_a_base_that_was_trained_to_pure_noise_is_trained_so():
    assert true_size().process.alphas_cumprod[-1] > 0  # type: ignore[union-attr]
    rescaled = true_size(rescale_betas_zero_snr=True)
    assert rescaled.process.alphas_cumprod[-1] == 0  # type: ignore[union-attr]


def test_a_base_of_version_1_is_refused():
    with pytest.raises(WeightsError, match=r"as Stable Diffusion 1.x has it. Set family.kind to s"):
        Sd2(Configured(SD15), Sd2Options(weights="x"))


def test_more_layers_are_not_skipped_than_there_are():
    with pytest.raises(WeightsError, match=r"family.clip_skip is 24, .* has 23 layers"):
        Sd2(Configured(SD21), Sd2Options(weights="x", clip_skip=24))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        random_folder("sd2"), dtype=torch.float32, safety_checker=None
    )


@pytest.mark.slow
def test_texts_are_those_of_the_diffusers_pipeline(pipeline: Any):
    family, captions = opened(), ["ink icon, winking face, face", ""]
    assert pipeline.tokenizer.pad_token_id == 0
    assert (family.tokens(captions)["ids"][1, 0, 2:] == 0).all(), "padded with the first token"
    positive, negative = pipeline.encode_prompt(captions[0], CPU, 1, True, negative_prompt="")
    found = family.load_encoder(device=CPU).encode_texts(captions)["text"]
    assert_close(found, torch.cat([positive, negative]).detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_denoiser_predicts_what_diffusers_does(pipeline: Any):
    family, random = opened(), np.random.default_rng(0)
    noisy = torch.from_numpy(random.normal(size=(2, 4, 8, 12))).float()
    text = torch.from_numpy(random.normal(size=(2, 77, 32))).float()
    timesteps = torch.tensor([3, 800])
    ours = family.load_denoiser(dtype=torch.float32, device=CPU)
    with torch.no_grad():
        expected = pipeline.unet(noisy, timesteps, text).sample
        found = family.predict(ours, noisy, timesteps, {"text": text})
    assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_picture_is_the_one_that_the_diffusers_pipeline_draws(prediction: str, tmp_path: Path):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = tmp_path / "base"
    shutil.copytree(random_folder("sd2"), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": prediction}))
    family = opened(folder)
    latents = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 4, 24, 32))).float()
    renderer = family.load_renderer(
        family.load_denoiser(dtype=torch.float32, device=CPU), dtype=torch.float32, device=CPU
    )
    ours = renderer.render("ink icon, cat", negative="red", latents=latents, steps=3, guidance=3.5)
    plain = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None
    )
    plain.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    for pipeline in (plain, family.load_pipeline(dtype=torch.float32, device=CPU)):
        pipeline.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
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


@pytest.mark.slow
def test_diffusers_reads_projections_as_the_linear_layers_that_they_are(tmp_path: Path):
    """sd-scripts writes them as 1x1 convolutions, which diffusers refuses for these bases."""
    family = opened()
    plain = family.load_pipeline(dtype=torch.float32, device=CPU)
    sites = [site for site in family.sites(plain.unet) if site.role == "projection"]
    assert len(sites) == 8
    random = np.random.default_rng(0)

    def halves(site: Any, *kernel: int) -> dict[str, torch.Tensor]:
        name = family.place(site.name).kohya
        shapes = {"lora_down": (2, site.inputs, *kernel), "lora_up": (site.outputs, 2, *kernel)}
        return {
            f"{name}.{word}.weight": torch.from_numpy(random.normal(size=shape)).float()
            for word, shape in shapes.items()
        } | {f"{name}.alpha": torch.tensor(1.0)}

    linear = {key: held for site in sites for key, held in halves(site).items()}
    save_file(linear, tmp_path / "linear.safetensors")
    plain.load_lora_weights(tmp_path / "linear.safetensors")
    for site in sites:
        layer = plain.unet.get_submodule(site.name.partition(".")[2])
        name = family.place(site.name).kohya
        up, down = (linear[f"{name}.{word}.weight"] for word in ("lora_up", "lora_down"))
        assert_close(layer.get_delta_weight("default_0"), 0.5 * up @ down, rtol=0, atol=1e-5)
    convolutions = {key: held for site in sites for key, held in halves(site, 1, 1).items()}
    save_file(convolutions, tmp_path / "convolutions.safetensors")
    other = family.load_pipeline(dtype=torch.float32, device=CPU)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_lora_weights(tmp_path / "convolutions.safetensors")
