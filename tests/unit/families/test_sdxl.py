"""SDXL: its layers in full size, two texts, sizes and crops, pictures, and the makers' names."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bases import random_folder
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from true_configs import SD15, SDXL, SDXL_UNET, Configured

from raylora.base.errors import WeightsError
from raylora.components.lent import Keeps
from raylora.families.sdxl import Sdxl, SdxlOptions
from raylora.weights.base import open_base

CPU = torch.device("cpu")
USUAL = ("attention", "mlp", "projection")
LONG = ", ".join(f"ink icon number {i}" for i in range(60))


def opened(folder: Path | None = None, **words: Any) -> Sdxl:
    place = str(folder or random_folder("sdxl"))
    return Sdxl(open_base(place, kind="sdxl"), SdxlOptions(weights=place, **words))


def true_size(unet: dict[str, Any] | None = None, **scheduler: Any) -> Sdxl:
    configs = {
        **SDXL,
        "unet": {**SDXL_UNET, **(unet or {})},
        "scheduler": {**SDXL["scheduler"], **scheduler},
    }
    return Sdxl(Configured(configs), SdxlOptions(weights="x"))


def changed(tmp_path: Path, part: str, **words: Any) -> Path:
    """The tiny base with other values in a config."""
    folder = tmp_path / "base"
    shutil.copytree(random_folder("sdxl"), folder)
    file = folder / part
    file.write_text(json.dumps({**json.loads(file.read_text()), **words}))
    return folder


@cache
def pipeline() -> Any:
    """The tiny base as diffusers alone reads it."""
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(
        random_folder("sdxl"), dtype=torch.float32, add_watermarker=False
    )


# -- layers


def kohya_names() -> set[str]:
    """The modules that sd-scripts trains, counted out: 22 and 102 a transformer, two encoders."""
    shallow = [f"input_blocks_{i}_1" for i in (4, 5)]
    shallow += [f"output_blocks_{i}_1" for i in (3, 4, 5)]
    deep = [f"input_blocks_{i}_1" for i in (7, 8)] + ["middle_block_1"]
    deep += [f"output_blocks_{i}_1" for i in (0, 1, 2)]
    attention = [f"attn{i}_{one}" for i in (1, 2) for one in ("to_q", "to_k", "to_v", "to_out_0")]
    names = set()
    for places, depth in ((shallow, 2), (deep, 10)):
        for place in places:
            names |= {f"lora_unet_{place}_proj_in", f"lora_unet_{place}_proj_out"}
            for i in range(depth):
                for layer in (*attention, "ff_net_0_proj", "ff_net_2"):
                    names.add(f"lora_unet_{place}_transformer_blocks_{i}_{layer}")
    for prefix, layers in (("lora_te1", 12), ("lora_te2", 32)):
        for i in range(layers):
            for layer in (
                *(f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")),
                "mlp_fc1",
                "mlp_fc2",
            ):
                names.add(f"{prefix}_text_model_encoder_layers_{i}_{layer}")
    return names


@pytest.mark.slow
def test_in_full_size_its_layers_are_those_of_sd_scripts():
    family = true_size()
    denoiser, encoders = family.skeletons()
    sites = [site for site in family.sites(denoiser) if site.role in USUAL]
    texts = [site for site in family.text_sites(encoders) if site.role in USUAL]
    first = [site for site in texts if site.component == "text_encoder"]
    assert (len(sites), len(first), len(texts) - len(first)) == (722, 72, 192)
    names = [family.place(site.name).kohya for site in [*sites, *texts]]
    assert len(names) == len(set(names))
    assert set(names) == kohya_names()
    shapes = {
        family.place(site.name).kohya: (site.kind, site.inputs, site.outputs)
        for site in [*sites, *texts]
    }
    place = "lora_unet_input_blocks_4_1"
    assert shapes[f"{place}_proj_in"] == ("linear", 640, 640)
    assert shapes[f"{place}_transformer_blocks_1_attn2_to_k"] == ("linear", 2048, 640)
    middle = "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj"
    assert shapes[middle] == ("linear", 1280, 10240)
    assert shapes["lora_te2_text_model_encoder_layers_31_mlp_fc1"] == ("linear", 1280, 5120)


@pytest.mark.slow
def test_diffusers_reads_the_makers_names_as_the_layers_that_they_name(tmp_path: Path):
    """A file of every linear and convolution of the blocks, of the tiny base, through peft."""
    family = opened()
    loaded = family.load_pipeline(dtype=torch.float32, device=CPU)
    encoders = {one: getattr(loaded, one) for one in family.text_components}
    sites = [
        site
        for site in [*family.sites(loaded.unet), *family.text_sites(encoders)]
        if site.role in (*USUAL, "residual")
    ]
    random, file, deltas = np.random.default_rng(0), {}, {}
    for site in sites:
        kernel = site.kernel if site.kind == "conv" else ()
        down = torch.from_numpy(random.normal(size=(2, site.inputs, *kernel))).float()
        up = torch.from_numpy(random.normal(size=(site.outputs, 2))).float()
        name = family.place(site.name).kohya
        file[f"{name}.lora_down.weight"] = down
        file[f"{name}.lora_up.weight"] = up.view(*up.shape, *(1 for _ in kernel))
        file[f"{name}.alpha"] = torch.tensor(1.0)
        deltas[site.name] = (0.5 * up @ down.flatten(1)).view(site.outputs, site.inputs, *kernel)
    assert len(file) == 3 * len(sites)
    save_file(file, tmp_path / "all.safetensors")
    loaded.load_lora_weights(tmp_path / "all.safetensors")
    for name, delta in deltas.items():
        component, _, path = name.partition(".")
        model = getattr(loaded, component)
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            layer = model.get_submodule(path.removeprefix("text_model."))
        assert_close(layer.get_delta_weight("default_0"), delta, rtol=0, atol=1e-5)


# -- what is refused, and what the header tells


def test_facts_of_the_true_base():
    family = true_size()
    assert (family.pixels_per_latent, family.latent_channels, family.size_step) == (8, 4, 32)
    assert family.text_bytes == 4 * (77 * 2048 + 1280)
    assert (family.blocks, family.block_ends, family.wants_geometry) == ((9, 3, 9), True, True)
    assert family.metadata == {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_sd_model_name": "true-size",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.prediction_type": "epsilon",
    }


def test_a_base_that_predicts_v_is_trained_so():
    family = true_size(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert family.process.prediction == "v_prediction"
    assert family.process.alphas_cumprod[-1] == 0  # type: ignore[union-attr]
    assert family.metadata["modelspec.prediction_type"] == "v"


def test_another_model_is_refused():
    with pytest.raises(WeightsError, match="this is not Stable Diffusion XL"):
        true_size({"addition_embed_type": None})
    with pytest.raises(WeightsError, match="this is not Stable Diffusion XL"):
        Sdxl(
            Configured({**SD15, "text_encoder_2": SDXL["text_encoder_2"]}), SdxlOptions(weights="x")
        )
    # as the refiner, which is told five numbers
    with pytest.raises(WeightsError, match=r"told 2560 numbers .* make 2816: this is XL's refiner"):
        true_size({"projection_class_embeddings_input_dim": 2560})


def test_no_other_layer_of_the_text_encoders_is_read():
    assert SdxlOptions(weights="x", clip_skip=2) == SdxlOptions(weights="x")
    with pytest.raises(ValidationError, match=r"family.clip_skip is 1, and SDXL reads the layer"):
        SdxlOptions(weights="x", clip_skip=1)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_each_text_encoder_names_the_cache_of_texts(part: str, tmp_path: Path):
    before = opened().encoder_facts()
    folder = tmp_path / "base"
    shutil.copytree(random_folder("sdxl"), folder)
    file = max((folder / part).iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    after = opened(folder).encoder_facts()
    assert after[0] == before[0]
    assert after[1] != before[1]


# -- texts


@pytest.mark.slow
def test_texts_are_those_of_the_diffusers_pipeline():
    family, captions = opened(), ["ink icon, winking face, face", ""]
    found = family.load_encoder(device=CPU).encode_texts(captions)
    texts = pipeline().encode_prompt(captions[0], None, CPU, 1, True, negative_prompt="")
    positive, negative, pooled, negative_pooled = (held.detach() for held in texts)
    assert_close(found["text"], torch.cat([positive, negative]).numpy(), rtol=0, atol=1e-6)
    expected = torch.cat([pooled, negative_pooled]).numpy()
    assert_close(found["pooled"], expected, rtol=0, atol=1e-6)
    assert found["text"].shape == (2, 77, 64)
    assert found["pooled"].shape == (2, 32)


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [75, 150, 225])
def test_long_captions_are_read_in_chunks_and_pooled_by_the_first(max_tokens: int):
    plain = pipeline()
    family = opened(max_tokens=max_tokens)
    found = family.load_encoder(device=CPU).encode_texts(["cat", LONG])
    assert sum(held.nbytes for held in found.values()) == 2 * family.text_bytes
    halves, pooled = [], None
    for tokenizer, encoder in (
        (plain.tokenizer, plain.text_encoder),
        (plain.tokenizer_2, plain.text_encoder_2),
    ):
        tokens = tokenizer(LONG).input_ids
        assert len(tokens) > 227
        chunks = [tokens[start : start + 75] for start in range(1, max_tokens, 75)]
        ids = torch.tensor([[tokens[0], *chunk, tokens[-1]] for chunk in chunks])
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        layer = output.hidden_states[-2]
        bodies = [row for chunk in layer for row in chunk[1:76]]
        halves.append(torch.stack([layer[0, 0], *bodies, layer[-1, 76]]))
        pooled = output[0][0]
    assert_close(found["text"][1], torch.cat(halves, dim=-1).numpy(), rtol=0, atol=1e-6)
    assert pooled is not None
    assert_close(found["pooled"][1], pooled.numpy(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_weights_multiply_both_texts_and_not_the_pooled_one():
    tokenizer = pipeline().tokenizer
    plain = opened().load_encoder(device=CPU).encode_texts(["ink icon, cat, dog"])
    heavy = opened(weighted_captions=True).load_encoder(device=CPU)
    found = heavy.encode_texts(["ink icon, (cat:1.5), dog"])
    before = 1 + len(tokenizer("ink icon,", add_special_tokens=False).input_ids)
    factors = np.ones((1, 77, 1), dtype=np.float32)
    factors[:, before : before + len(tokenizer("cat", add_special_tokens=False).input_ids)] = 1.5
    assert_close(found["text"], plain["text"] * factors, rtol=0, atol=1e-6)
    assert_close(found["pooled"], plain["pooled"], rtol=0, atol=1e-6)


# -- predictions


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.normal(size=shape)).to(dtype)

    conditions = {"text": normal(2, 77, 64), "pooled": normal(2, 32)}
    conditions["geometry"] = torch.tensor(
        [[1000, 1500, 0, 128, 64, 96], [512, 512, 8, 0, 64, 64.0]]
    )
    return normal(2, 4, 8, 12), torch.tensor([3, 800]), conditions


@pytest.mark.slow
def test_the_denoiser_predicts_what_diffusers_does():
    family = opened()
    noisy, timesteps, conditions = given(torch.float32)
    told = {"text_embeds": conditions["pooled"], "time_ids": conditions["geometry"]}
    ours = family.load_denoiser(dtype=torch.float32, device=CPU)
    with torch.no_grad():
        expected = (
            pipeline().unet(noisy, timesteps, conditions["text"], added_cond_kwargs=told).sample
        )
        found = family.predict(ours, noisy, timesteps, conditions)
    assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["text", "pooled", "geometry"])
def test_everything_that_it_is_told_matters(word: str):
    family = opened()
    denoiser = family.load_denoiser(dtype=torch.float32, device=CPU)
    noisy, timesteps, conditions = given(torch.float32)
    other = {**conditions, word: conditions[word] + 1}
    with torch.no_grad():
        first, second = (
            family.predict(denoiser, noisy, timesteps, one) for one in (conditions, other)
        )
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 1e-5


@pytest.mark.slow
def test_sizes_are_told_apart_in_half_precision():
    """In bf16 1000 and 1001 would be one number."""
    family = opened()
    denoiser = family.load_denoiser(dtype=torch.bfloat16, device=CPU)
    noisy, timesteps, conditions = given(torch.bfloat16)
    assert conditions["geometry"][0, 0].bfloat16() == (conditions["geometry"][0, 0] + 1).bfloat16()
    other = {**conditions, "geometry": conditions["geometry"] + 1}
    with torch.no_grad():
        first, second = (
            family.predict(denoiser, noisy, timesteps, one) for one in (conditions, other)
        )
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first[0], second[0])
    half = {**conditions, "geometry": conditions["geometry"].bfloat16()}
    with pytest.raises(AssertionError):
        family.predict(denoiser, noisy, timesteps, half)


# -- pictures

LATENTS = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 4, 24, 32))).float()


def drawn_by(pipe: Any) -> np.ndarray:
    picture = pipe(
        "ink icon, cat",
        negative_prompt="red",
        height=48,
        width=64,
        latents=LATENTS,
        num_inference_steps=3,
        guidance_scale=3.5,
        output_type="np",
    ).images[0]
    whole: np.ndarray = (picture * 255).round().astype(int)
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_picture_is_the_one_that_the_diffusers_pipeline_draws(prediction: str, tmp_path: Path):
    from diffusers import StableDiffusionXLPipeline

    folder = changed(tmp_path, "scheduler/scheduler_config.json", prediction_type=prediction)
    family = opened(folder)
    renderer = family.load_renderer(
        family.load_denoiser(dtype=torch.float32, device=CPU), dtype=torch.float32, device=CPU
    )
    ours = renderer.render(
        "ink icon, cat",
        negative="red",
        latents=LATENTS,
        steps=3,
        guidance=3.5,
        sampler="euler",
        process=family.process,
    )
    assert ours.shape == (48, 64, 3)
    plain = StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=torch.float32, add_watermarker=False
    )
    for pipe in (plain, family.load_pipeline(dtype=torch.float32, device=CPU)):
        assert type(pipe) is StableDiffusionXLPipeline
        assert abs(ours.astype(int) - drawn_by(pipe)).max() <= 1


@pytest.mark.slow
def test_latents_are_not_clipped_by_a_scheduler_that_was_made_for_pixels():
    """The base's scheduler is Euler, whose config says nothing of it; DDIM clips unless told."""
    from diffusers import DDIMScheduler

    family = opened()
    renderer = family.load_renderer(
        family.load_denoiser(dtype=torch.float32, device=CPU), dtype=torch.float32, device=CPU
    )
    words: dict[str, Any] = {"negative": "red", "latents": LATENTS, "steps": 3, "guidance": 3.5}
    ours = renderer.render("ink icon, cat", **words, sampler="ddim").astype(int)
    pipe = family.load_pipeline(dtype=torch.float32, device=CPU)
    config = pipe.scheduler.config
    assert "clip_sample" not in config
    free, clipped = (DDIMScheduler.from_config(config, clip_sample=clip) for clip in (False, True))
    pipe.scheduler = free
    assert abs(ours - drawn_by(pipe)).max() <= 1
    pipe.scheduler = clipped
    assert abs(ours - drawn_by(pipe)).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("forced", [True, False])
def test_a_vae_that_float16_is_too_narrow_for_decodes_in_float32(forced: bool, tmp_path: Path):
    folder = changed(tmp_path, "vae/config.json", force_upcast=forced)
    family = opened(folder)
    denoiser = family.load_denoiser(dtype=torch.float16, device=CPU)
    lender = Keeps(CPU)
    renderer = family.load_renderer(denoiser, dtype=torch.float16, device=CPU, lender=lender)
    words = {"negative": "red", "latents": LATENTS, "steps": 3, "guidance": 3.5, "sampler": "euler"}
    half = renderer.render("ink icon, cat", **words)
    with lender.lend("vae", lambda device: pytest.fail("the VAE was drawn with")) as vae:
        dtype = next(vae.parameters()).dtype
    assert dtype == (torch.float32 if forced else torch.float16)
    exact = family.load_renderer(
        family.load_denoiser(dtype=torch.float32, device=CPU), dtype=torch.float32, device=CPU
    )
    whole = exact.render("ink icon, cat", **words)
    # fp16 keeps 11 bits, and these are 3 steps of a model whose weights are noise
    assert abs(half.astype(int) - whole.astype(int)).mean() < 2
    assert half.std() > 1
