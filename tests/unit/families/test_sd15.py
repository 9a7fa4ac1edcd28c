"""SD 1.x: what is refused, and agreement with diffusers and with sd-scripts' choice of layers."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import SD15_MODULES, TINY_BASE, sd15_components
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from raylora.base.errors import WeightsError
from raylora.base.site import Site
from raylora.families.sd15 import Sd15, Sd15Options
from raylora.weights.base import open_base

GOLDEN = Path(__file__).parents[2] / "golden"
CPU = torch.device("cpu")


def opened(folder: Path = TINY_BASE, **words: Any) -> Sd15:
    options = Sd15Options(weights=str(folder), **words)
    parts = {**options.parts, **({"vae": options.vae} if options.vae else {})}
    return Sd15(open_base(str(folder), kind="sd15", parts=parts), options)


USUAL = ("attention", "mlp", "projection")
"""What sd-scripts trains without convolutions."""


def with_roles(sites: list[Site], *roles: str) -> list[Site]:
    return [site for site in sites if site.role in roles]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The configs of the tiny base, to be spoiled."""
    for part in ("unet", "vae", "text_encoder", "scheduler"):
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
        ("unet/config.json", {"use_linear_projection": True}, "Set family.kind to sd2"),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "sample"},
            "prediction_type 'sample'; sd15 knows epsilon and v_prediction",
        ),
        ("scheduler/scheduler_config.json", {"beta_schedule": "odd"}, "beta_schedule 'odd'"),
        ("unet/config.json", {"in_channels": 9}, "reads 9 channels: this is an inpainting"),
        ("vae/config.json", {"latent_channels": 16}, "4 channels, and the VAE makes 16"),
        ("text_encoder/config.json", {"hidden_size": 48}, "text encoders give 48"),
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


def test_more_layers_are_not_skipped_than_there_are(base: Path):
    opened(base, clip_skip=2)
    with pytest.raises(
        WeightsError, match=r"family.clip_skip is 3, .* has 2 layers. Choose 1 to 2"
    ):
        opened(base, clip_skip=3)
    change(base / "text_encoder/config.json", num_hidden_layers=12)
    opened(base, clip_skip=12)


@pytest.mark.parametrize("words", [{"clip_skip": 0}, {"max_tokens": 100}, {"max_tokens": 77}])
def test_settings_of_text_have_bounds(words: dict[str, int]):
    with pytest.raises(ValidationError, match=next(iter(words))):
        Sd15Options(weights="x", **words)


def test_one_vae_is_named():
    assert Sd15Options(weights="x", vae="a").vae == "a"
    assert Sd15Options(weights="x", parts={"vae": "b"}).parts == {"vae": "b"}
    with pytest.raises(ValidationError, match=r"family.vae and family.parts.vae: give one"):
        Sd15Options(weights="x", vae="a", parts={"vae": "b"})


def test_each_setting_of_text_names_another_cache_of_texts_alone():
    settings: list[dict[str, Any]] = [
        {}, {"clip_skip": 2}, {"max_tokens": 150}, {"max_tokens": 225}, {"weighted_captions": True},
    ]  # fmt: skip
    facts = [opened(**words).encoder_facts() for words in settings]
    assert all(latents == facts[0][0] for latents, _ in facts)
    assert len({json.dumps(text) for _, text in facts}) == len(settings)


@pytest.mark.slow
def test_weights_in_a_caption_are_counted_as_tokens_only_when_they_are_text():
    captions = ["ink (cat:1.3)", "ink cat"]
    weighted = opened(weighted_captions=True).count_tokens(captions)
    plain = opened().count_tokens(captions)
    assert weighted[0] == weighted[1] == plain[1] < plain[0]


@pytest.mark.parametrize(
    ("network", "unet", "text"),
    list(zip(SD15_MODULES, (192, 278), (72, 72), strict=True)),
)
def test_all_layers_are_those_of_sd_scripts(network: str, unet: int, text: int):
    """UNet and text encoder of SD 1.5 in full size: names, and the shapes that a file gets."""
    models, family = sd15_components(), opened()
    roles = (*USUAL, "residual") if unet > 192 else USUAL
    sites = with_roles(family.sites(models["unet"]), *roles)
    assert len(sites) == unet
    texts = with_roles(family.text_sites(models), *USUAL)
    assert len(texts) == text
    theirs = {
        name: ([shapes[0][1], *shapes[0][2:]], [shapes[1][0]])
        for name, shapes in SD15_MODULES[network].items()
    }
    ours = {
        family.place(site.name).kohya: (
            [site.inputs, *(site.kernel if site.kind == "conv" else ())],
            [site.outputs],
        )
        for site in [*sites, *texts]
    }
    assert ours == theirs


def test_a_layers_block_is_that_of_sd_scripts():
    recorded = json.loads((GOLDEN / "param_groups.json").read_text())
    theirs = recorded["block_index"]
    family = opened()
    sites = with_roles(family.sites(sd15_components()["unet"]), *USUAL, "residual")
    ours = {family.place(site.name).kohya: site.block for site in sites}
    assert {name: ours[name] for name in theirs} == theirs
    # the table leaves out the 3x3 convolutions, whose place follows from their neighbours'
    assert ours["lora_unet_down_blocks_1_downsamplers_0_conv"] == 6
    assert ours["lora_unet_up_blocks_0_upsamplers_0_conv"] == 15
    assert all(block is not None for block in ours.values())


@pytest.mark.parametrize(
    "words", [{}, {"clip_skip": 2, "max_tokens": 150, "weighted_captions": True}]
)
def test_tokens_read_in_training_give_what_the_cache_holds(words: dict[str, Any]):
    captions = ["ink icon, a (red:1.3) cat", "", "a long one, " * 30]
    family = opened(**words)
    cached = family.load_encoder(device=CPU).encode_texts(captions)
    encoders = family.load_text_encoders(dtype=torch.float32, device=CPU)
    tokens = {name: torch.from_numpy(held) for name, held in family.tokens(captions).items()}
    read = family.read_tokens(encoders, tokens)
    assert read.keys() == cached.keys()
    assert_close(read["text"], torch.from_numpy(cached["text"]), rtol=0, atol=1e-6)


def test_skeletons_have_the_layers_of_what_is_loaded():
    family = opened()
    denoiser, encoders = family.skeletons()
    loaded = family.load_denoiser(dtype=torch.float32, device=CPU)
    texts = family.load_text_encoders(dtype=torch.float32, device=CPU)
    assert all(weight.is_meta for weight in denoiser.parameters())
    assert family.sites(denoiser) == family.sites(loaded)
    assert family.text_sites(encoders) == family.text_sites(texts)
    assert family.text_sites(encoders) != []


def test_another_vae_names_other_latents_and_the_same_texts(tmp_path: Path):
    other = tmp_path / "vae"
    shutil.copytree(TINY_BASE / "vae", other)
    weights = next(other.glob("*.safetensors"))
    held = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in held.items()}, weights)
    plain, changed = opened(), opened(vae=str(other))
    latents, texts = plain.encoder_facts()
    other_latents, other_texts = changed.encoder_facts()
    assert latents != other_latents
    assert texts == other_texts
    assert plain.fingerprint() == changed.fingerprint()
    pixels = np.zeros((1, 3, 32, 32), np.float32)
    found = [one.load_encoder(device=CPU).encode_images(pixels) for one in (plain, changed)]
    assert not np.array_equal(found[0]["latents"], found[1]["latents"])
    change(other / "config.json", force_upcast="as it may be")
    renamed = opened(vae=str(other)).encoder_facts()[0]
    assert renamed != other_latents, "its config is its own"
    change(other / "config.json", scaling_factor=2 * other_latents["scaling"])
    scaled = opened(vae=str(other))
    assert scaled.encoder_facts()[0]["scaling"] == 2 * other_latents["scaling"]
    latents_again = scaled.load_encoder(device=CPU).encode_images(pixels)["latents"]
    assert_close(latents_again, 2 * found[1]["latents"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("component", "prefix"), [("unet", "lora_unet_"), ("text_encoder", "lora_te_")]
)
def test_what_is_attention_are_the_layers_that_sd_scripts_names_so(component: str, prefix: str):
    family, models = opened(), sd15_components()
    every = [*family.sites(models["unet"]), *family.text_sites(models)]
    sites = [site for site in with_roles(every, "attention") if site.component == component]
    theirs = {
        name
        for name in next(iter(SD15_MODULES.values()))
        if name.startswith(prefix) and "_attn" in name
    }
    assert {family.place(site.name).kohya for site in sites} == theirs


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


@cache
def clip() -> tuple[Any, Any]:
    """The tiny base's tokenizer and text encoder, by transformers alone."""
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(TINY_BASE / "text_encoder", dtype=torch.float32)
    return tokenizer, encoder.requires_grad_(False).eval()


LONG = ", ".join(f"ink icon number {i}" for i in range(60))


@pytest.mark.slow
def test_with_defaults_texts_are_the_last_hidden_states_to_the_bit():
    tokenizer, encoder = clip()
    captions = ["ink (cat:1.3), [dog]", "", LONG]
    ids = tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    found = opened().load_encoder(device=CPU).encode_texts(captions)["text"]
    assert np.array_equal(found, encoder(ids).last_hidden_state.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [75, 150, 225])
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_long_captions_are_read_in_chunks_of_75(max_tokens: int, clip_skip: int):
    tokenizer, encoder = clip()
    tokens = tokenizer(LONG).input_ids
    assert len(tokens) > 227
    chunks = [tokens[start : start + 75] for start in range(1, max_tokens, 75)]
    ids = torch.tensor([[tokens[0], *chunk, tokens[-1]] for chunk in chunks])
    states = encoder(ids, output_hidden_states=True).hidden_states
    layer = encoder.final_layer_norm(states[-clip_skip])
    bodies = [row for chunk in layer for row in chunk[1:76]]
    expected = torch.stack([layer[0, 0], *bodies, layer[-1, 76]])
    family = opened(max_tokens=max_tokens, clip_skip=clip_skip)
    found = family.load_encoder(device=CPU).encode_texts(["ink icon", LONG])["text"]
    assert found.nbytes == 2 * family.text_bytes
    assert_close(found[1], expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_weights_multiply_the_embeddings_of_their_tokens():
    tokenizer, _ = clip()
    plain = opened().load_encoder(device=CPU).encode_texts(["ink icon, cat, dog"])["text"]
    heavy = opened(weighted_captions=True).load_encoder(device=CPU)
    found = heavy.encode_texts(["ink icon, (cat:1.5), [dog]"])["text"]
    factors = np.ones((1, 77, 1), dtype=np.float32)
    before = 1 + len(tokenizer("ink icon,", add_special_tokens=False).input_ids)
    cat, dog = (len(tokenizer(word, add_special_tokens=False).input_ids) for word in ("cat", "dog"))
    factors[:, before : before + cat] = 1.5
    factors[:, before + cat + 1 : before + cat + 1 + dog] = 1 / 1.1
    assert_close(found, plain * factors, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [{"clip_skip": 2}, {"max_tokens": 150}, {"weighted_captions": True}]
)
def test_previews_are_told_prompts_as_training_is_told_captions(words: dict[str, Any]):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    family = opened(**words)
    prompt, negative = f"(red heart:1.6), {LONG}", "[blue] cat"
    renderer = family.load_renderer(
        family.load_denoiser(dtype=torch.float32, device=CPU), dtype=torch.float32, device=CPU
    )
    latents = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 4, 12, 16))).float()
    ours = renderer.render(prompt, negative=negative, latents=latents, steps=3, guidance=3.5)
    pipeline = StableDiffusionPipeline.from_pretrained(
        TINY_BASE, dtype=torch.float32, safety_checker=None
    )
    pipeline.scheduler = DDIMScheduler.from_pretrained(TINY_BASE / "scheduler")
    texts = torch.from_numpy(
        family.load_encoder(device=CPU).encode_texts([prompt, negative])["text"]
    )
    theirs = pipeline(
        prompt_embeds=texts[:1],
        negative_prompt_embeds=texts[1:],
        height=48,
        width=64,
        latents=latents,
        num_inference_steps=3,
        guidance_scale=3.5,
        output_type="np",
    ).images[0]
    assert abs(ours.astype(int) - (theirs * 255).round().astype(int)).max() <= 1
    usual = opened().load_renderer(
        family.load_denoiser(dtype=torch.float32, device=CPU), dtype=torch.float32, device=CPU
    )
    other = usual.render(prompt, negative=negative, latents=latents, steps=3, guidance=3.5)
    assert abs(ours.astype(int) - other).max() > 1


@pytest.mark.slow
def test_the_renderer_is_the_diffusers_pipeline():
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    family = opened()
    renderer = family.load_renderer(
        family.load_denoiser(dtype=torch.float32, device=CPU), dtype=torch.float32, device=CPU
    )
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


@pytest.mark.parametrize(("part", "word"), [("vae", 0), ("text_encoder", 1)])
def test_a_config_that_changes_the_encoder_changes_its_name(tmp_path: Path, part: str, word: int):
    base = tmp_path / "base"
    shutil.copytree(Path(__file__).parents[3] / "jobs/quickstart/tiny-sd", base)
    before = opened(base).encoder_facts()
    file = base / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "other"}))
    after = opened(base).encoder_facts()
    assert after[word] != before[word]
    assert after[1 - word] == before[1 - word]
