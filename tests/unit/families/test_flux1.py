"""FLUX.1: its layers in full size, the makers' names, text, timesteps, guidance and pictures."""

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
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close
from true_configs import CLIP_L, VAE, Configured

from raylora.base.errors import WeightsError
from raylora.families.flux1 import (
    Flux1,
    Flux1Options,
    pack_latents,
    patch_positions,
    unpack_latents,
)
from raylora.weights.base import open_base

CPU = torch.device("cpu")
USUAL = ("attention", "mlp", "modulation")
LONG = ", ".join(f"ink icon number {i}" for i in range(300))
TRUE_SIZE: dict[str, Any] = {
    "transformer": {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "in_channels": 64,
        "patch_size": 1,
        "guidance_embeds": True,
    },
    "vae": {**VAE, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": CLIP_L,
    "text_encoder_2": {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
}


def opened(kind: str = "flux1", folder: Path | None = None, **words: Any) -> Flux1:
    place = str(folder or random_folder(kind))
    return Flux1(open_base(place, kind="flux1"), Flux1Options(weights=place, **words))


def true_size(**words: Any) -> Flux1:
    return Flux1(Configured(TRUE_SIZE), Flux1Options(weights="x", **words))


@cache
def denoiser(dtype: torch.dtype = torch.float32) -> nn.Module:
    return opened().load_denoiser(dtype=dtype, device=CPU)


@cache
def pipeline(kind: str = "flux1") -> Any:
    """The tiny base as diffusers alone reads it."""
    plain = FluxPipeline.from_pretrained(random_folder(kind), dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    return plain


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def conditions_of(family: Flux1, *captions: str) -> dict[str, Tensor]:
    encoders = family.load_text_encoders(dtype=torch.float32, device=CPU)
    tokens = {name: torch.from_numpy(held) for name, held in family.tokens(captions).items()}
    with torch.no_grad():
        return family.read_tokens(encoders, tokens)


def predicted(family: Flux1, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
    with torch.no_grad():
        return family.predict(denoiser(noisy.dtype), noisy, timesteps, conditions)


# -- layers and their names


def kohya_names() -> set[str]:
    """As notes of sd-scripts' modules have them: 190 in double blocks and 114 in single ones."""
    streams = [
        f"{stream}_{layer}"
        for stream in ("img", "txt")
        for layer in ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin")
    ]
    singles = ("linear1", "linear2", "modulation_lin")
    return {f"lora_unet_double_blocks_{i}_{one}" for i in range(19) for one in streams} | {
        f"lora_unet_single_blocks_{i}_{one}" for i in range(38) for one in singles
    }


@pytest.mark.slow
def test_in_full_size_its_modules_are_those_of_sd_scripts():
    family = true_size()
    transformer, encoders = family.skeletons()
    sites = family.sites(transformer)
    names = {family.place(site.name).kohya for site in sites if site.role in USUAL}
    assert len(names) == 304
    assert names == kohya_names()
    assert sum(site.role in USUAL for site in sites) == 494
    texts = [site for site in family.text_sites(encoders) if site.kind == "linear"]
    found = [family.place(site.name).kohya for site in texts]
    assert sum(name.startswith("lora_te1_text_model_encoder_layers_") for name in found) == 72
    assert sum(name.startswith("lora_te3_encoder_block_") for name in found) == 24 * 7
    assert "lora_te3_encoder_block_23_layer_0_SelfAttention_o" in found
    assert "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_1" in found
    assert family.blocks == (19, 0, 38)
    inside = [site for site in sites if site.section]
    assert {site.block for site in inside} == set(range(57))
    assert all(site.block == site.number + 19 * (site.section == "single") for site in inside)


def original_file(family: Flux1, held: dict[str, Tensor], sites: list[Any]) -> dict[str, Tensor]:
    """Weights under the makers' names and in their order, by `place` alone."""
    pieces: dict[str, dict[tuple[int, int, int] | None, Tensor]] = {}
    for site in sites:
        place, path = family.place(site.name), site.name.partition(".")[2]
        assert place.prefix == "lora_unet"
        for word in ("weight", "bias"):
            if f"{path}.{word}" not in held:
                continue
            value = held.pop(f"{path}.{word}")
            if place.halves_swapped:
                first, second = value.chunk(2)
                value = torch.cat([second, first])
            ending = "scale" if site.kind == "norm" else word
            pieces.setdefault(f"{place.path}.{ending}", {})[place.rows] = value
    found = {}
    for name, parts in pieces.items():
        if None not in parts:
            ordered = sorted(rows for rows in parts if rows is not None)
            ends = [0, *(last for _, last, _ in ordered)]
            assert [first for first, _, _ in ordered] == ends[:-1]
            assert {of for _, _, of in ordered} == {ends[-1]}
            found[name] = torch.cat([parts[rows] for rows in ordered])
        else:
            assert len(parts) == 1
            found[name] = parts[None]
    return found


@pytest.mark.slow
def test_weights_under_the_makers_names_are_read_by_diffusers_as_they_were():
    family = true_size()
    transformer, _ = family.skeletons()
    # Rows are all that names and orders are about, so that one column is enough.
    weights = {
        name: numbers(len(held), *[1] * (held.ndim - 1), seed=seed)
        for seed, (name, held) in enumerate(transformer.state_dict().items())
    }
    left = dict(weights)
    file = original_file(family, left, family.sites(transformer))
    assert left == {}, "every weight of the transformer is of a layer that an adapter can sit on"
    back = convert_flux_transformer_checkpoint_to_diffusers(file)
    assert back.keys() == weights.keys()
    assert file == {}
    for name, value in back.items():
        assert torch.equal(value, weights[name]), name


# -- text


@pytest.mark.parametrize(("kind", "length"), [("flux1", 512), ("schnell", 256)])
@pytest.mark.parametrize("caption", ["ink icon, cat", "", LONG])
def test_text_is_what_the_pipeline_makes_of_it(kind: str, length: int, caption: str):
    found = conditions_of(opened(kind), caption)
    with torch.no_grad():
        text, pooled, _ = pipeline(kind).encode_prompt(caption, None, max_sequence_length=length)
    assert found.keys() == {"text", "pooled"}
    assert found["text"].shape[1] == length
    assert torch.equal(found["text"], text)
    assert torch.equal(found["pooled"], pooled)


def test_t5_reads_as_much_as_it_is_told():
    family = opened(t5_max_tokens=100)
    found = conditions_of(family, "ink icon", LONG)
    with torch.no_grad():
        text, _, _ = pipeline().encode_prompt(LONG, None, max_sequence_length=100)
    assert_close(found["text"][1:], text, rtol=0, atol=1e-5)  # two at once sum in another order
    assert sum(held[0].numel() * 4 for held in found.values()) == family.text_bytes
    assert family.max_tokens == 99
    with pytest.raises(ValidationError, match="t5_max_tokens"):
        opened(t5_max_tokens=513)


def test_each_setting_of_text_names_another_cache_of_texts_alone():
    settings: list[dict[str, Any]] = [{}, {"t5_max_tokens": 256}, {"mask_t5": True}]
    facts = [opened(**words).encoder_facts() for words in settings]
    assert all(latents == facts[0][0] for latents, _ in facts)
    assert len({json.dumps(text) for _, text in facts}) == len(settings)
    assert opened(guidance=2).encoder_facts() == facts[0]


def test_hidden_padding_is_as_if_it_were_not_there():
    family, short = opened(mask_t5=True), "ink icon, cat"
    found = conditions_of(family, short, LONG)
    assert sum(held[0].numel() * 4 for held in found.values()) == family.text_bytes
    count = int(found["text_mask"][0].sum())
    assert count == family.count_tokens([short])[0] + 1
    noisy, timesteps = numbers(2, 16, 4, 6), torch.tensor([300.0, 800.0])
    together = predicted(family, noisy, timesteps, found)
    encoder = family.load_text_encoders(dtype=torch.float32, device=CPU)["text_encoder_2"]
    with torch.no_grad():
        ids = torch.from_numpy(family.tokens([short])["ids_2"][:, :count])
        text = encoder(ids).last_hidden_state
    alone = {"text": text, "pooled": found["pooled"][:1]}
    plain = predicted(opened(), noisy[:1], timesteps[:1], alone)
    assert_close(together[:1], plain, rtol=0, atol=1e-5)
    without = {word: held for word, held in found.items() if word != "text_mask"}
    assert not torch.allclose(predicted(opened(), noisy, timesteps, without), together, atol=1e-3)


# -- prediction


def test_packing_is_the_pipelines_and_can_be_undone():
    latents = numbers(2, 16, 6, 10)
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpack_latents(packed, 6, 10), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, CPU, torch.float32)
    assert torch.equal(patch_positions(6, 10, device=CPU), ids)


@pytest.mark.parametrize("guidance", [None, 3.5])
def test_it_predicts_what_the_plain_transformer_predicts(guidance: float | None):
    family = opened(guidance=guidance)
    found = conditions_of(family, "ink icon, cat", "a dog")
    noisy, timesteps = numbers(2, 16, 4, 6), torch.tensor([3.3, 901.7])
    with torch.no_grad():
        plain = pipeline().transformer(
            hidden_states=FluxPipeline._pack_latents(noisy, 2, 16, 4, 6),
            encoder_hidden_states=found["text"],
            pooled_projections=found["pooled"],
            timestep=timesteps / 1000,
            guidance=torch.full((2,), guidance or 1.0),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 2, 3, CPU, torch.float32),
            txt_ids=torch.zeros(512, 3),
            return_dict=False,
        )[0]
    expected = FluxPipeline._unpack_latents(plain, 8, 12, 2)
    assert torch.equal(predicted(family, noisy, timesteps, found), expected)


def test_it_predicts_what_the_pipeline_predicts_in_each_of_its_steps():
    family, plain = opened(guidance=3.5), pipeline()
    found = conditions_of(family, "ink icon, cat")
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def see(module: nn.Module, arguments: Any, words: Any, output: Any) -> None:
        seen.append((words["hidden_states"], words["timestep"], output[0]))

    hook = plain.transformer.register_forward_hook(see, with_kwargs=True)
    latents = pack_latents(numbers(1, 16, 4, 6))
    asked = {"height": 8, "width": 12, "latents": latents, "num_inference_steps": 3}
    plain("ink icon, cat", output_type="latent", guidance_scale=3.5, **asked)
    hook.remove()
    assert len(seen) == 3
    for packed, timestep, output in seen:
        noisy = unpack_latents(packed, 4, 6)
        ours = predicted(family, noisy, 1000 * timestep, found)
        assert_close(ours, unpack_latents(output, 4, 6), rtol=0, atol=1e-5)  # t / 1000 rounds


@pytest.mark.parametrize("plain", [False, True])
def test_timesteps_that_bf16_cannot_tell_apart_are_told_apart(plain: bool):
    family, model = opened(), denoiser(torch.bfloat16)
    captions = conditions_of(family, "a cat", "a cat", "a cat")
    found = {word: held.bfloat16() for word, held in captions.items()}
    seen: list[tuple[Tensor, Tensor]] = []
    embedder = model.time_text_embed
    hooks = [
        embedder.time_proj.register_forward_hook(lambda m, a, out: seen.append((a[0], out))),
        embedder.register_forward_hook(lambda m, a, out: seen.append((a[0], out))),
    ]
    noisy, timesteps = numbers(3, 16, 4, 4).bfloat16(), torch.tensor([900.0, 901.0, 902.0])
    with torch.no_grad():
        if plain:  # as diffusers alone has it
            model(
                pack_latents(noisy),
                found["text"],
                found["pooled"],
                timesteps / 1000,
                patch_positions(4, 4, device=CPU),
                torch.zeros(512, 3),
                torch.ones(3),
            )
        else:
            family.predict(model, noisy, timesteps, found)
    for hook in hooks:
        hook.remove()
    (told, waves), (guidance, _), (_, embedded) = seen
    if plain:
        assert torch.equal(told[1], told[2])
        assert torch.equal(embedded[1], embedded[2])
    else:
        assert len({tuple(row) for row in embedded.tolist()}) == 3
        assert_close(told, timesteps)
        assert torch.equal(guidance, torch.full((3,), 1000.0))
        frequencies = 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
        angles = timesteps.double()[:, None] * frequencies
        # The angles are float32 of up to 901, whose steps are 6e-5.
        assert_close(waves.double(), torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=1e-4)


def test_schnell_is_told_no_guidance():
    family = opened("schnell")
    assert not family.guided
    assert (family.usual_steps, family.usual_guidance, family.usual_embedded_guidance) == (
        4,
        1,
        None,
    )
    assert family.metadata["modelspec.architecture"] == "flux-1-schnell"
    assert opened().metadata["modelspec.architecture"] == "flux-1-dev"
    found = conditions_of(family, "a cat")
    model = family.load_denoiser(dtype=torch.float32, device=CPU)
    with torch.no_grad():
        prediction = family.predict(model, numbers(1, 16, 4, 4), torch.tensor([500.0]), found)
    assert torch.isfinite(prediction).all()
    assert not any("guidance" in site.name for site in family.sites(model))
    with pytest.raises(WeightsError, match=r"guidance is 3.5, and .* is told no guidance"):
        opened("schnell", guidance=3.5)


# -- pictures


def drawn(kind: str, **words: Any) -> np.ndarray:
    family = opened(kind)
    renderer = family.load_renderer(
        family.load_denoiser(dtype=torch.float32, device=CPU), dtype=torch.float32, device=CPU
    )
    return renderer.render("ink icon, cat", latents=numbers(1, 16, 12, 8), **words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "asked", "told"),
    [
        ("flux1", {"guidance": 1}, {}),
        ("flux1", {"guidance": 1, "embedded_guidance": 7}, {"guidance_scale": 7}),
        ("flux1", {"guidance": 3}, {"true_cfg_scale": 3, "negative_prompt": "a dog"}),
        ("schnell", {"guidance": 1}, {"max_sequence_length": 256}),
    ],
)
def test_pictures_are_the_pipelines_own(kind: str, asked: Any, told: Any):
    ours = drawn(kind, negative="a dog", steps=4, **asked)
    plain = pipeline(kind)(
        "ink icon, cat",
        latents=pack_latents(numbers(1, 16, 12, 8)),
        height=24,
        width=16,
        num_inference_steps=4,
        output_type="np",
        **told,
    ).images[0]
    assert ours.shape == (24, 16, 3)
    assert np.array_equal(ours, (plain * 255).round().astype(np.uint8))


def test_what_a_picture_is_asked_to_be_changes_it():
    usual = {"negative": "", "steps": 3, "guidance": 1.0}
    plain = drawn("flux1", **usual)
    assert np.array_equal(drawn("flux1", **usual, embedded_guidance=3.5), plain)
    for other in ({"embedded_guidance": 1.0}, {"guidance": 4.0}, {"sampler": "heun"}):
        assert not np.array_equal(drawn("flux1", **{**usual, **other}), plain), other


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures_hide_the_padding_as_training_does(guidance: float):
    family = opened(mask_t5=True, guidance=3.5)
    model, latents = family.load_denoiser(dtype=torch.float32, device=CPU), numbers(1, 16, 4, 6)
    renderer = family.load_renderer(model, dtype=torch.float32, device=CPU)
    asked = {"negative": "a black dog", "latents": latents, "steps": 3, "guidance": guidance}
    picture = renderer.render("ink icon, cat", **asked)
    assert not model._forward_pre_hooks
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline().scheduler.config)
    mu = 0.5 + (1.15 - 0.5) * (6 - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 3, 3), mu=mu)
    wanted, unwanted = (conditions_of(family, one) for one in ("ink icon, cat", "a black dog"))
    for timestep in scheduler.timesteps:
        slope = predicted(family, latents, timestep[None], wanted)
        if guidance > 1:
            against = predicted(family, latents, timestep[None], unwanted)
            slope = against + guidance * (slope - against)
        latents = scheduler.step(slope, timestep, latents, return_dict=False)[0]
    vae = pipeline().vae
    with torch.no_grad():
        decoded = vae.decode(latents / 0.3611 + 0.1159, return_dict=False)[0]
    expected = (decoded / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(picture - expected).max() < 1.01  # rounded to whole numbers
    plain = (
        opened(guidance=3.5)
        .load_renderer(model, dtype=torch.float32, device=CPU)
        .render("ink icon, cat", **asked)
    )
    assert not np.array_equal(plain, picture)


# -- what is refused


def changed(tmp_path: Path, part: str, **words: Any) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(random_folder("flux1"), folder)
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **words}))
    return folder


@pytest.mark.parametrize(
    ("part", "words", "sentence"),
    [
        (
            "transformer",
            {"_class_name": "SD3Transformer2DModel"},
            "flux1 needs a FluxTransformer2D",
        ),
        (
            "transformer",
            {"in_channels": 128, "out_channels": 64},
            "takes 128 numbers a patch: this is a FLUX.1 for filling",
        ),
        ("vae", {"latent_channels": 4}, "the VAE's latents make 16: .* Set family.vae to FLUX.1's"),
        ("text_encoder_2", {"d_model": 48}, "reads text 32 wide, and text_encoder_2 gives 48"),
        ("vae", {"_class_name": "AutoencoderDC"}, "flux1 needs a AutoencoderKL"),
    ],
)
def test_a_base_of_another_kind_is_refused(tmp_path: Path, part: str, words: Any, sentence: str):
    with pytest.raises(WeightsError, match=sentence):
        opened(folder=changed(tmp_path, part, **words))
