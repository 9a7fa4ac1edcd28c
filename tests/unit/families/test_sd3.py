"""SD 3 and 3.5: layers in full size, the makers' names, three texts, dropout and pictures."""

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
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close
from true_configs import CLIP_BIG_G, CLIP_L, VAE, Configured

from raylora.base.errors import WeightsError
from raylora.families.sd3 import Sd3, Sd3Options
from raylora.weights.base import open_base

CPU = torch.device("cpu")
USUAL = ("attention", "mlp", "modulation")
LONG = ", ".join(f"ink icon number {i}" for i in range(300))
MEDIUM: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "num_layers": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "sample_size": 128,
    "pos_embed_max_size": 192,
}
TRANSFORMERS = {
    "medium": MEDIUM,
    "5-medium": {
        **MEDIUM,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
        "pos_embed_max_size": 384,
    },
    "5-large": {
        **MEDIUM,
        "num_attention_heads": 38,
        "num_layers": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
    },
}
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


def opened(kind: str = "sd3", folder: Path | None = None, **words: Any) -> Sd3:
    place = str(folder or random_folder(kind))
    return Sd3(open_base(place, kind="sd3"), Sd3Options(weights=place, **words))


def true_size(model: str) -> Sd3:
    configs: dict[str, Any] = {
        "transformer": TRANSFORMERS[model],
        "vae": {**VAE, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_BIG_G,
        "text_encoder_3": T5_XXL,
    }
    return Sd3(Configured(configs), Sd3Options(weights="x"))


@pytest.fixture
def without_t5(tmp_path: Path) -> Path:
    folder = tmp_path / "without-t5"
    shutil.copytree(random_folder("sd3"), folder)
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    file = folder / "model_index.json"
    none = [None, None]
    words = {**json.loads(file.read_text()), "text_encoder_3": none, "tokenizer_3": none}
    file.write_text(json.dumps(words))
    return folder


@cache
def denoiser(kind: str = "sd3", dtype: torch.dtype = torch.float32) -> nn.Module:
    return opened(kind).load_denoiser(dtype=dtype, device=CPU)


@cache
def pipeline(kind: str = "sd3") -> Any:
    """The tiny base as diffusers alone reads it."""
    plain = StableDiffusion3Pipeline.from_pretrained(random_folder(kind), dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    return plain


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def conditions_of(family: Sd3, *captions: str) -> dict[str, Tensor]:
    encoders = family.load_text_encoders(dtype=torch.float32, device=CPU)
    tokens = {name: torch.from_numpy(held) for name, held in family.tokens(captions).items()}
    with torch.no_grad():
        return family.read_tokens(encoders, tokens)


def encoded(plain: Any, caption: str, length: int = 256) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        text, _, pooled, _ = plain.encode_prompt(
            caption, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    return text, pooled


# -- layers and their names


def kohya_names(model: str) -> set[str]:
    """As notes of sd-scripts' modules have them: ten a block, seven in the last."""
    layers = ("attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2", "adaLN_modulation_1")
    depth = TRANSFORMERS[model]["num_layers"]
    names = {
        f"lora_unet_joint_blocks_{i}_{side}_block_{layer}"
        for i in range(depth)
        for side in ("x", "context")
        for layer in layers
    }
    names -= {f"lora_unet_joint_blocks_{depth - 1}_context_block_{one}" for one in layers[1:4]}
    for i in TRANSFORMERS[model].get("dual_attention_layers", ()):
        names |= {f"lora_unet_joint_blocks_{i}_x_block_attn2_{one}" for one in ("qkv", "proj")}
    return names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "modules"), [("medium", 237), ("5-large", 377), ("5-medium", 263)]
)
def test_in_full_size_its_modules_are_those_of_sd_scripts(model: str, modules: int):
    family = true_size(model)
    transformer, encoders = family.skeletons()
    sites = family.sites(transformer)
    names = {family.place(site.name).kohya for site in sites if site.role in USUAL}
    assert len(names) == modules
    assert names == kohya_names(model)
    depth = TRANSFORMERS[model]["num_layers"]
    assert family.blocks == (depth, 0, 0)
    inside = [site for site in sites if site.section]
    assert {site.block for site in inside} == set(range(depth))
    assert {site.section for site in inside} == {"joint"}
    texts = [site for site in family.text_sites(encoders) if site.kind == "linear"]
    found = [family.place(site.name).kohya for site in texts]
    assert len(set(found)) == len(found)
    prefixes = ("lora_te1_text_model_encoder_", "lora_te2_text_model_encoder_", "lora_te3_encoder_")
    counts = [sum(name.startswith(prefix) for name in found) for prefix in prefixes]
    assert counts == [72, 192, 168]
    assert family.metadata["modelspec.architecture"] == f"stable-diffusion-3-{model}"


@pytest.mark.slow
@pytest.mark.parametrize("model", list(TRANSFORMERS))
def test_weights_under_the_makers_names_are_read_by_diffusers_as_they_were(model: str):
    family = true_size(model)
    transformer, _ = family.skeletons()
    # Rows are all that names and orders are about, so that one column is enough.
    weights = {
        name: numbers(len(held), *[1] * (held.ndim - 1), seed=seed)
        for seed, (name, held) in enumerate(transformer.state_dict().items())
    }
    left = dict(weights)
    file = {"pos_embed": left.pop("pos_embed.pos_embed")}
    joined: dict[str, list[tuple[tuple[int, int, int], Tensor]]] = {}
    for site in family.sites(transformer):
        place, path = family.place(site.name), site.name.partition(".")[2]
        assert place.prefix == "lora_unet"
        for word in ("weight", "bias"):
            if f"{path}.{word}" not in left:
                continue
            value, name = left.pop(f"{path}.{word}"), f"{place.path}.{word}"
            if place.halves_swapped:
                first, second = value.chunk(2)
                value = torch.cat([second, first])
            if place.rows is None:
                assert name not in file
                file[name] = value
            else:
                joined.setdefault(name, []).append((place.rows, value))
    assert left == {}, "every weight of the transformer is of a layer that an adapter can sit on"
    for name, parts in joined.items():
        parts.sort(key=lambda part: part[0])
        ends = [0, *(rows[1] for rows, _ in parts)]
        assert [rows[0] for rows, _ in parts] == ends[:-1]
        assert {rows[2] for rows, _ in parts} == {ends[-1]}
        file[name] = torch.cat([value for _, value in parts])
    back = convert_sd3_transformer_checkpoint_to_diffusers(file)
    assert back.keys() == weights.keys()
    assert file == {}
    for name, value in back.items():
        assert torch.equal(value, weights[name]), name


# -- text


@pytest.mark.parametrize("length", [256, 77])
@pytest.mark.parametrize("caption", ["ink icon, cat", "", LONG])
def test_text_is_what_the_pipeline_makes_of_it(caption: str, length: int):
    family = opened(t5_max_tokens=length)
    found = conditions_of(family, caption)
    text, pooled = encoded(pipeline(), caption, length)
    assert torch.equal(found["text"], text)
    assert torch.equal(found["pooled"], pooled)
    assert sum(held.numel() * 4 for held in found.values()) == family.text_bytes


def test_without_t5_its_text_is_zeros_as_the_pipeline_has_it(without_t5: Path):
    family = opened(folder=without_t5)
    assert family.text_components == ("text_encoder", "text_encoder_2")
    assert family.encoder_dropout == (0, 0)
    assert family.max_tokens == 75
    found = conditions_of(family, "ink icon, cat")
    plain = StableDiffusion3Pipeline.from_pretrained(
        without_t5, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    text, pooled = encoded(plain, "ink icon, cat")
    assert torch.equal(found["text"], text)
    assert torch.equal(found["pooled"], pooled)
    assert not found["text"][:, 77:].any()
    own = family.load_pipeline(dtype=torch.float32, device=CPU)
    assert own.text_encoder_3 is own.tokenizer_3 is None
    assert len(family.text_sites(family.skeletons()[1])) < len(
        opened().text_sites(opened().skeletons()[1])
    )


def test_each_setting_of_text_names_another_cache_of_texts_alone():
    settings: list[dict[str, Any]] = [
        {}, {"t5_max_tokens": 77}, {"mask_t5": True}, {"mask_clip": True},
    ]  # fmt: skip
    facts = [opened(**words).encoder_facts() for words in settings]
    assert all(latents == facts[0][0] for latents, _ in facts)
    assert len({json.dumps(text) for _, text in facts}) == len(settings)
    assert opened(t5_dropout=0.5).encoder_facts() == facts[0]


def test_a_masked_t5_reads_as_if_there_were_no_padding():
    family, caption = opened(mask_t5=True), "ink icon, cat"
    found = conditions_of(family, caption, LONG)
    ids = torch.from_numpy(family.tokens([caption])["ids_3"])
    count = family.count_tokens([caption])[0] + 1
    encoder = family.load_text_encoders(dtype=torch.float32, device=CPU)["text_encoder_3"]
    with torch.no_grad():
        alone = encoder(ids[:, :count]).last_hidden_state
    assert_close(found["text"][:1, 77 : 77 + count], alone, rtol=0, atol=1e-5)
    plain = conditions_of(opened(), caption)["text"]
    assert not torch.allclose(plain[:, 77 : 77 + count], alone, atol=1e-2)
    assert torch.equal(plain[:, :77], conditions_of(family, caption)["text"][:, :77])


def test_masked_clips_change_what_is_said_of_the_padding_alone():
    caption = "ink icon, cat"
    found, plain = (conditions_of(opened(mask_clip=on), caption) for on in (True, False))
    read = len(pipeline().tokenizer(caption).input_ids)
    assert_close(found["text"][:, :read], plain["text"][:, :read], rtol=0, atol=1e-5)
    assert_close(found["pooled"], plain["pooled"], rtol=0, atol=1e-5)
    assert not torch.allclose(found["text"][:, read:77], plain["text"][:, read:77], atol=1e-2)
    assert torch.equal(found["text"][:, 77:], plain["text"][:, 77:])
    ours = pipeline()
    held = ours.tokenizer(caption, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        states = ours.text_encoder(**held, output_hidden_states=True).hidden_states
    assert torch.equal(found["text"][:, :77, :32], states[-2])


# -- prediction


def predicted(kind: str, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
    with torch.no_grad():
        return opened(kind).predict(denoiser(kind, noisy.dtype), noisy, timesteps, conditions)


@pytest.mark.parametrize("kind", ["sd3", "sd35"])
def test_it_predicts_what_the_plain_transformer_predicts(kind: str):
    found = conditions_of(opened(kind), "ink icon, cat", "a dog")
    noisy, timesteps = numbers(2, 16, 4, 6), torch.tensor([3.3, 901.7])
    with torch.no_grad():
        plain = pipeline(kind).transformer(
            noisy, found["text"], found["pooled"], timesteps, return_dict=False
        )[0]
    assert torch.equal(predicted(kind, noisy, timesteps, found), plain)


@pytest.mark.parametrize("kind", ["sd3", "sd35"])
def test_it_predicts_what_the_pipeline_predicts_in_each_of_its_steps(kind: str):
    found = conditions_of(opened(kind), "ink icon, cat")
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    plain = pipeline(kind)
    hook = plain.transformer.register_forward_hook(
        lambda m, a, words, out: seen.append((words["hidden_states"], words["timestep"], out[0])),
        with_kwargs=True,
    )
    asked: dict[str, Any] = {"latents": numbers(1, 16, 4, 6), "height": 8, "width": 12}
    plain("ink icon, cat", num_inference_steps=3, guidance_scale=1, output_type="latent", **asked)
    hook.remove()
    assert len(seen) == 3
    for noisy, timestep, output in seen:
        assert torch.equal(predicted(kind, noisy, timestep, found), output)


def test_timesteps_that_bf16_cannot_tell_apart_are_told_apart():
    model = denoiser("sd3", torch.bfloat16)
    captions = conditions_of(opened(), "a cat", "a cat", "a cat")
    found = {word: held.bfloat16() for word, held in captions.items()}
    timesteps = torch.tensor([900.0, 901.0, 902.0])
    assert len(set(timesteps.bfloat16().tolist())) < 3
    seen: list[Tensor] = []
    hook = model.time_text_embed.register_forward_hook(lambda m, a, out: seen.extend((a[0], out)))
    predicted("sd3", numbers(3, 16, 4, 4).bfloat16(), timesteps, found)
    hook.remove()
    told, embedded = seen
    assert torch.equal(told, timesteps)
    assert len({tuple(row) for row in embedded.tolist()}) == 3


def test_a_dropped_encoder_says_zeros(without_t5: Path):
    family = opened(clip_l_dropout=0.1, clip_g_dropout=0.2, t5_dropout=0.3)
    assert family.encoder_dropout == (0.1, 0.2, 0.3)
    found = conditions_of(family, *["ink icon, cat"] * 5)
    dropped = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1.0]])
    expected = {word: held.clone() for word, held in found.items()}
    expected["text"][[1, 4], :77, :32] = 0
    expected["text"][[2, 4], :77, 32:64] = 0
    expected["text"][[3, 4], 77:] = 0
    expected["pooled"][[1, 4], :32] = 0
    expected["pooled"][[2, 4], 32:] = 0
    noisy, timesteps = numbers(1, 16, 4, 6).repeat(5, 1, 1, 1), torch.full((5,), 500.0)
    ours = predicted("sd3", noisy, timesteps, {**found, "dropped": dropped})
    assert torch.equal(ours, predicted("sd3", noisy, timesteps, expected))
    assert len({row.numpy().tobytes() for row in ours}) == 5
    bare = opened(folder=without_t5)
    missing = conditions_of(bare, "ink icon, cat")
    plain = predicted("sd3", noisy[:1], timesteps[:1], missing)
    assert_close(ours[3:4], plain, rtol=0, atol=1e-5)
    with torch.no_grad():
        both = bare.predict(
            denoiser(), noisy[:1], timesteps[:1], {**missing, "dropped": torch.ones(1, 2)}
        )
    assert_close(both, ours[4:], rtol=0, atol=1e-5)


# -- pictures


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "sd35"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_pictures_are_the_pipelines_own(kind: str, guidance: float):
    latents = numbers(1, 16, 12, 8)
    ours = (
        opened(kind)
        .load_renderer(denoiser(kind), dtype=torch.float32, device=CPU)
        .render("ink icon, cat", negative="a dog", latents=latents, steps=4, guidance=guidance)
    )
    plain = pipeline(kind)(
        "ink icon, cat",
        negative_prompt="a dog",
        latents=latents,
        height=24,
        width=16,
        num_inference_steps=4,
        guidance_scale=guidance,
        output_type="np",
    ).images[0]
    assert ours.shape == (24, 16, 3)
    assert np.array_equal(ours, (plain * 255).round().astype(np.uint8))


def test_what_a_picture_is_asked_to_be_changes_it():
    renderer = opened().load_renderer(denoiser(), dtype=torch.float32, device=CPU)
    usual: dict[str, Any] = {
        "negative": "", "steps": 3, "guidance": 4.0, "latents": numbers(1, 16, 12, 8),
    }  # fmt: skip
    plain = renderer.render("a cat", **usual)
    for other in ({"guidance": 1.0}, {"sampler": "heun"}, {"negative": "a dog"}, {"steps": 4}):
        assert not np.array_equal(renderer.render("a cat", **{**usual, **other}), plain), other
    assert np.array_equal(renderer.render("a cat", **usual), plain)


# -- what is refused


@pytest.mark.parametrize(
    ("part", "words", "sentence"),
    [
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "sd3 needs a SD3Transformer2D"),
        ("text_encoder_2", {"projection_dim": 48}, "pooled text 64 wide, .* give 80"),
        ("text_encoder_3", {"d_model": 48}, "text 64 wide, and text_encoder_3 gives 48"),
        ("vae", {"_class_name": "AutoencoderDC"}, "sd3 needs a AutoencoderKL"),
        ("vae", {"latent_channels": 4}, "16 channels, and the VAE makes 4: .*family.vae"),
    ],
)
def test_a_base_of_another_kind_is_refused(tmp_path: Path, part: str, words: Any, sentence: str):
    folder = tmp_path / "base"
    shutil.copytree(random_folder("sd3"), folder)
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **words}))
    with pytest.raises(WeightsError, match=sentence):
        opened(folder=folder)


@pytest.mark.parametrize("words", [{"mask_t5": True}, {"t5_dropout": 0.1}])
def test_words_of_t5_are_refused_where_there_is_none(without_t5: Path, words: Any):
    with pytest.raises(
        WeightsError, match=rf"{next(iter(words))} is of T5, and .* has no text_enc"
    ):
        opened(folder=without_t5, **words)


@pytest.mark.parametrize(
    "words", [{"t5_max_tokens": 76}, {"t5_max_tokens": 513}, {"clip_l_dropout": 1.1}]
)
def test_settings_of_text_have_bounds(words: dict[str, Any]):
    with pytest.raises(ValidationError, match=next(iter(words))):
        Sd3Options(weights="x", **words)


@pytest.mark.parametrize("kind", ["sd3", "sd35"])
def test_halves_change_places_where_diffusers_norm_has_scale_first(kind: str):
    family = opened(kind)
    sites = family.sites(family.skeletons()[0])
    swapped = {site.name for site in sites if family.place(site.name).halves_swapped}
    last = f"transformer.transformer_blocks.{family.blocks[0] - 1}.norm1_context.linear"
    assert swapped == {"transformer.norm_out.linear", last}


def test_what_is_read_of_a_caption_leaves_room_for_its_last_token():
    family = opened(t5_max_tokens=100)
    (many,) = family.count_tokens(["ink, " * 300])
    ids = family.tokens(["ink, " * 300, ""])["ids_3"]
    assert many > family.max_tokens == (ids[0] > 1).sum() == 99
