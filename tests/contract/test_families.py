"""Every model family, found by listing: what the cache, the trainer and the preview rely on."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import fresh_adapter
from bases import open_tiny, tiny_folder
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.adapt.attach import Attachment
from raylora.adapt.keys import kohya_name, layer_at
from raylora.base.encoder import Encoder
from raylora.base.errors import WeightsError
from raylora.base.lookup import plugins
from raylora.families import Family, FamilyOptions, Models, get_family
from raylora.networks import get_network

KINDS = plugins("raylora.families")
CPU = torch.device("cpu")
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def opened(kind: str) -> Family:
    return open_tiny(kind)


@cache
def denoiser_of(kind: str) -> nn.Module:
    return opened(kind).load_denoiser(dtype=torch.float32, device=CPU)


@cache
def texts_of(kind: str) -> Models:
    return opened(kind).load_text_encoders(dtype=torch.float32, device=CPU)


@cache
def encoder_of(kind: str) -> Encoder:
    return opened(kind).load_encoder(device=CPU)


def pixels(family: Family, count: int) -> np.ndarray:
    size = (count, 3, 2 * family.size_step, 3 * family.size_step)
    return np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)


@every_kind
def test_its_file_name_is_its_word(kind: str):
    family, options = get_family(kind)
    assert issubclass(family, Family)
    assert issubclass(options, FamilyOptions)
    assert options(weights="x").kind == kind
    assert options.__doc__


@every_kind
def test_it_says_what_it_is(kind: str):
    family = opened(kind)
    assert family.component in ("unet", "transformer")
    assert family.size_step % family.pixels_per_latent == 0
    assert {"ss_base_model_version", "ss_sd_model_name", "modelspec.architecture"} <= set(
        family.metadata
    )
    assert all(isinstance(value, str) for value in family.metadata.values())
    assert family.process.steps == len(family.process.alphas_cumprod)


@every_kind
def test_a_folder_that_is_another_model_is_refused(kind: str, tmp_path: Path):
    with pytest.raises(WeightsError, match="is missing"):
        open_tiny(kind, tmp_path)


@every_kind
def test_its_native_size_is_made_of_its_steps(kind: str):
    options = get_family(kind)[1]
    assert options.native_resolution >= options.bucket_step > 0
    assert options.native_resolution % options.bucket_step == 0
    assert options.bucket_step % opened(kind).size_step == 0


@pytest.mark.slow
@every_kind
def test_tokens_and_sizes_are_known_without_weights(kind: str, tmp_path: Path):
    folder = tmp_path / "no-weights"
    shutil.copytree(tiny_folder(kind), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    family = open_tiny(kind, folder)
    nothing, few, more, many = family.count_tokens(["", "ink icon", "ink icon, ink", "cat, " * 300])
    assert nothing == 0 < few < more < many
    assert many >= 300, "cut off"
    assert family.count_tokens([]) == []
    assert all(len(held) == 2 for held in family.tokens(["ink icon", ""]).values())
    assert family.text_bytes > 0
    step = family.size_step
    assert 0 < 2 * family.latents_bytes((step, step)) == family.latents_bytes((step, 2 * step))


@every_kind
def test_longer_captions_are_an_option_where_they_are_advised(kind: str):
    family = opened(kind)
    if family.max_tokens is None:
        assert family.longer_tokens == ()
        return
    assert list(family.longer_tokens) == sorted(set(family.longer_tokens))
    before = family
    for tokens in family.longer_tokens:
        longer = open_tiny(kind, max_tokens=tokens)
        assert longer.max_tokens == tokens > before.max_tokens
        assert longer.text_bytes > before.text_bytes
        assert longer.longer_tokens == before.longer_tokens[1:]
        before = longer


@pytest.mark.slow
@every_kind
def test_sizes_in_the_cache_are_estimated_to_the_byte(kind: str):
    family, encoder = opened(kind), encoder_of(kind)
    given = pixels(family, 1)
    latents = encoder.encode_images(given)
    size = (given.shape[3], given.shape[2])
    assert sum(array.nbytes for array in latents.values()) == family.latents_bytes(size)
    texts = encoder.encode_texts(["a cat", "a dog"])
    assert sum(array.nbytes for array in texts.values()) == 2 * family.text_bytes


@pytest.mark.slow
@every_kind
def test_the_denoiser_is_frozen(kind: str):
    denoiser = denoiser_of(kind)
    assert not denoiser.training
    assert not any(weight.requires_grad for weight in denoiser.parameters())
    assert all(weight.dtype == torch.float32 for weight in denoiser.parameters())
    assert not any(weight.is_meta for weight in [*denoiser.parameters(), *denoiser.buffers()])


@every_kind
@pytest.mark.parametrize("layers", ["attention", "attention_mlp"])
def test_its_sites_are_layers_of_the_denoiser(kind: str, layers: str):
    family, denoiser = opened(kind), denoiser_of(kind)
    sites = family.sites(denoiser, layers)
    assert sites
    for site in sites:
        component, _, path = site.name.partition(".")
        layer = denoiser.get_submodule(path)
        assert component == family.component
        if site.kind == "linear":
            assert isinstance(layer, nn.Linear)
            assert (layer.in_features, layer.out_features) == (site.inputs, site.outputs)
        else:
            assert isinstance(layer, nn.Conv2d)
            assert (layer.in_channels, layer.out_channels) == (site.inputs, site.outputs)
    names = {kohya_name(site.name) for site in sites}
    assert len(names) == len(sites), "two layers would have one name in the file"


@every_kind
def test_attention_is_a_part_of_attention_and_mlp_in_the_same_order(kind: str):
    family, denoiser = opened(kind), denoiser_of(kind)
    few, many = (family.sites(denoiser, layers) for layers in ("attention", "attention_mlp"))
    assert len(few) < len(many)
    assert [site for site in many if site in few] == few
    assert family.sites(denoiser, "attention_mlp") == many


@every_kind
def test_convolutions_are_added_to_the_layers_that_are_there_without(kind: str):
    family, denoiser = opened(kind), denoiser_of(kind)
    for layers in ("attention", "attention_mlp"):
        plain = family.sites(denoiser, layers)
        more = family.sites(denoiser, layers, convolutions=True)
        assert [site for site in more if site in plain] == plain
        for site in more:
            layer = layer_at(denoiser, site.name)
            if isinstance(layer, nn.Conv2d):
                found = (layer.kernel_size, layer.stride, layer.padding)
                assert found == (site.kernel, site.stride, site.padding)


@pytest.mark.slow
@every_kind
def test_images_become_latents(kind: str):
    family, encoder = opened(kind), encoder_of(kind)
    given = pixels(family, 2)
    latents = encoder.encode_images(given)["latents"]
    height, width = (side // family.pixels_per_latent for side in given.shape[2:])
    assert latents.shape == (2, family.latent_channels, height, width)
    assert latents.dtype == np.float32
    assert np.isfinite(latents).all()
    assert 0.2 < latents.std() < 5, "latents are not scaled to about 1"
    alone = encoder.encode_images(given[1:])["latents"]
    assert_close(alone, latents[1:], rtol=0, atol=1e-4)  # fp32, another order of sums
    assert np.array_equal(encoder.encode_images(given)["latents"], latents)


@pytest.mark.slow
@every_kind
def test_captions_become_tensors(kind: str):
    encoder = encoder_of(kind)
    both = encoder.encode_texts(["ink icon, cat", ""])
    assert "text" in both
    long = encoder.encode_texts(["cat, " * 300])
    for word, array in both.items():
        assert len(array) == 2
        assert array[:1].shape == long[word].shape, "captions of any length have one shape"
        assert not np.array_equal(array[0], array[1])
        assert np.isfinite(array).all()
        alone = encoder.encode_texts([""])[word]
        assert_close(alone[0], array[1], rtol=0, atol=1e-4)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_have_the_shape_of_the_latents(kind: str, dtype: torch.dtype):
    family = opened(kind)
    denoiser = family.load_denoiser(dtype=dtype, device=CPU)
    captions = encoder_of(kind).encode_texts(["a cat", "a dog"])
    conditions = {word: torch.from_numpy(array).to(dtype) for word, array in captions.items()}
    side = family.size_step // family.pixels_per_latent
    for height, width in ((side, side), (2 * side, 3 * side)):
        latents = torch.linspace(-1, 1, 2 * family.latent_channels * height * width)
        noisy = latents.view(2, family.latent_channels, height, width).to(dtype)
        timesteps = torch.tensor([0, family.process.steps - 1])
        with torch.no_grad():
            prediction = family.predict(denoiser, noisy, timesteps, conditions)
            again = family.predict(denoiser, noisy, timesteps, conditions)
            alone = family.predict(
                denoiser, noisy[1:], timesteps[1:], {w: t[1:] for w, t in conditions.items()}
            )
        assert (prediction.shape, prediction.dtype) == (noisy.shape, dtype)
        assert torch.isfinite(prediction).all()
        assert torch.equal(again, prediction)
        if dtype == torch.float32:
            assert_close(alone[0], prediction[1], rtol=0, atol=1e-4)


@every_kind
def test_facts_are_json_and_the_same_each_time(kind: str):
    first, second = open_tiny(kind).encoder_facts(), open_tiny(kind).encoder_facts()
    assert first == second
    assert json.loads(json.dumps(first)) == list(first)
    encoder = encoder_of(kind)
    assert (encoder.latents_facts, encoder.text_facts) == first


@every_kind
@pytest.mark.parametrize(("part", "changed"), [("vae", 0), ("text_encoder", 1), ("tokenizer", 1)])
def test_facts_follow_the_weights_and_not_the_place(
    kind: str, part: str, changed: int, tmp_path: Path
):
    folder = tmp_path / "moved"
    shutil.copytree(tiny_folder(kind), folder)
    before = opened(kind).encoder_facts()
    assert open_tiny(kind, folder).encoder_facts() == before
    file = max((folder / part).iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    after = open_tiny(kind, folder).encoder_facts()
    assert after[changed] != before[changed]
    assert after[1 - changed] == before[1 - changed]


@pytest.mark.slow
@every_kind
def test_a_renderer_draws_the_size_it_is_given(kind: str):
    family, denoiser = opened(kind), denoiser_of(kind)
    side = 2 * family.size_step // family.pixels_per_latent
    latents = torch.linspace(-2, 2, family.latent_channels * side * side)
    latents = latents.view(1, family.latent_channels, side, side)
    renderer = family.load_renderer(denoiser)
    drawn = [
        renderer.render(prompt, negative="", latents=latents, steps=2, guidance=3.0)
        for prompt in ("a cat", "a cat", "a dog")
    ]
    assert drawn[0].shape == (2 * family.size_step, 2 * family.size_step, 3)
    assert drawn[0].dtype == np.uint8
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


# -- text encoders in training


CAPTIONS = ["ink icon, cat", "", "a dog"]


def read(family: Family, encoders: Models, captions: list[str]) -> dict[str, Tensor]:
    tokens = {name: torch.from_numpy(held) for name, held in family.tokens(captions).items()}
    return family.read_tokens(encoders, tokens)


@every_kind
def test_its_text_encoders_are_frozen_and_named_as_files_name_them(kind: str):
    encoders = texts_of(kind)
    assert encoders
    for component, encoder in encoders.items():
        assert component.startswith("text_encoder")
        assert not encoder.training
        assert not any(weight.requires_grad for weight in encoder.parameters())
        assert all(weight.dtype == torch.float32 for weight in encoder.parameters())


@every_kind
def test_text_sites_are_layers_of_the_text_encoders(kind: str):
    family, encoders = opened(kind), texts_of(kind)
    few, many = (family.text_sites(encoders, layers) for layers in ("attention", "attention_mlp"))
    assert 0 < len(few) < len(many)
    assert [site for site in many if site in few] == few
    for site in many:
        layer = layer_at(encoders[site.component], site.name)
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (site.inputs, site.outputs)
    every = [*family.sites(denoiser_of(kind), "attention_mlp", convolutions=True), *many]
    assert len({kohya_name(site.name) for site in every}) == len(every)


@every_kind
def test_skeletons_have_the_layers_and_no_weights(kind: str):
    family = opened(kind)
    denoiser, encoders = family.skeletons()
    for model in (denoiser, *encoders.values()):
        assert all(weight.is_meta for weight in model.parameters())
    assert encoders.keys() == texts_of(kind).keys()
    for layers in ("attention", "attention_mlp"):
        assert family.text_sites(encoders, layers) == family.text_sites(texts_of(kind), layers)
        for convolutions in (False, True):
            found, expected = (
                family.sites(model, layers, convolutions=convolutions)
                for model in (denoiser, denoiser_of(kind))
            )
            assert found == expected


@every_kind
def test_tokens_read_one_by_one_or_together_are_the_cached_texts(kind: str):
    family, encoders = opened(kind), texts_of(kind)
    cached = encoder_of(kind).encode_texts(CAPTIONS)
    tokens = family.tokens(CAPTIONS)
    assert all(len(held) == len(CAPTIONS) for held in tokens.values())
    for name, held in family.tokens(["cat, " * 300]).items():
        assert held.shape[1:] == tokens[name].shape[1:], "captions of any length have one shape"
    with torch.no_grad():
        together = read(family, encoders, CAPTIONS)
        alone = [read(family, encoders, [caption]) for caption in CAPTIONS]
    assert together.keys() == cached.keys()
    for word, array in cached.items():
        assert_close(together[word], torch.from_numpy(array), rtol=0, atol=1e-4)
        joined = torch.cat([one[word] for one in alone])
        assert_close(joined, together[word], rtol=0, atol=1e-4)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_text_is_read_in_the_encoders_dtype(kind: str, dtype: torch.dtype):
    family = opened(kind)
    encoders = family.load_text_encoders(dtype=dtype, device=CPU)
    with torch.no_grad():
        found = read(family, encoders, CAPTIONS)
    assert {tensor.dtype for tensor in found.values()} == {dtype}


@every_kind
def test_gradients_reach_every_layer_of_the_text_encoders(kind: str):
    family, encoders = opened(kind), texts_of(kind)
    network = get_network("lora")
    sites = family.text_sites(encoders, "attention_mlp")
    adapter = fresh_adapter(
        network, network.options(rank=2), sites, seed=0, dtype=torch.float32, device=CPU
    )
    with torch.no_grad():
        adapter.values += 0.1 * torch.sin(torch.arange(len(adapter.values)))
    attached = [Attachment(model, component, adapter) for component, model in encoders.items()]
    conditions = read(family, encoders, CAPTIONS)
    torch.stack([held.square().sum() for held in conditions.values()]).sum().backward()
    for attachment in attached:
        attachment.detach()
    for site, held in adapter.parameters.items():
        for word, leaf in held.items():
            assert leaf.grad is not None
            assert leaf.grad.any(), f"{site} {word}"
    assert all(weight.grad is None for one in encoders.values() for weight in one.parameters())


@every_kind
def test_checkpointed_blocks_keep_less_and_give_the_same_gradients(kind: str):
    family = opened(kind)
    found: list[tuple[int, Tensor]] = []
    for on in (False, True):
        denoiser = family.load_denoiser(dtype=torch.float32, device=CPU)
        encoders = family.load_text_encoders(dtype=torch.float32, device=CPU)
        if on:
            family.checkpoint_blocks(denoiser, encoders)
        network = get_network("lora")
        sites = [*family.sites(denoiser, "attention"), *family.text_sites(encoders, "attention")]
        adapter = fresh_adapter(
            network, network.options(rank=2), sites, seed=0, dtype=torch.float32, device=CPU
        )
        with torch.no_grad():
            adapter.values += 0.02 * torch.sin(torch.arange(len(adapter.values)))
        for component, model in {family.component: denoiser, **encoders}.items():
            Attachment(model, component, adapter)
        side = family.size_step // family.pixels_per_latent
        noisy = torch.linspace(-1, 1, family.latent_channels * side * side)
        noisy = noisy.view(1, family.latent_channels, side, side)
        held: list[int] = []

        def keep(tensor: Tensor, held: list[int] = held) -> Tensor:
            held.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            conditions = read(family, encoders, ["a cat"])
            texts = sum(held)
            family.predict(
                denoiser, noisy, torch.tensor([500]), conditions
            ).square().sum().backward()
        found.append((texts, adapter.gradients.clone()))
        found.append((sum(held) - texts, adapter.gradients))
    assert found[2][0] < found[0][0] / 2, "of the text encoders"
    assert found[3][0] < found[1][0] / 2, "of the denoiser"
    assert found[0][1].any()
    assert torch.equal(found[0][1], found[2][1])


@pytest.mark.slow
@every_kind
def test_a_renderer_reads_prompts_with_the_text_encoders_it_is_given(kind: str):
    family, denoiser = opened(kind), denoiser_of(kind)
    side = 2 * family.size_step // family.pixels_per_latent
    latents = torch.linspace(-2, 2, family.latent_channels * side * side)
    latents = latents.view(1, family.latent_channels, side, side)
    encoders = family.load_text_encoders(dtype=torch.float32, device=CPU)
    given, own = family.load_renderer(denoiser, encoders), family.load_renderer(denoiser)

    def drawn() -> list[np.ndarray]:
        return [
            one.render("a cat", negative="", latents=latents, steps=2, guidance=3.0)
            for one in (given, own)
        ]

    before = drawn()
    assert np.array_equal(*before)
    with torch.no_grad():
        for encoder in encoders.values():
            for weight in encoder.parameters():
                weight *= 1.2
    after = drawn()
    assert np.array_equal(after[1], before[1])
    assert not np.array_equal(after[0], before[0])
