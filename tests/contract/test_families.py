"""Every model family, found by listing: what the cache, the trainer and the preview rely on."""

from __future__ import annotations

import json
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import fresh_adapter
from bases import TRAINED, open_tiny, tiny_folder
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.adapt.attach import Attachment
from raylora.base.encoder import Encoder
from raylora.base.errors import WeightsError
from raylora.base.lookup import plugins
from raylora.base.site import Site
from raylora.diffusion.process import Flow, Process
from raylora.families import Family, FamilyOptions, Models, get_family
from raylora.memory.placed import Placed
from raylora.memory.setting import Setting
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


def layer_at(models: Models, site: Site) -> nn.Module:
    """The layer of a site; a text encoder's name has a level that its model may not have."""
    model, path = models[site.component], site.name.partition(".")[2]
    try:
        return model.get_submodule(path)
    except AttributeError:
        return model.get_submodule(path.removeprefix("text_model."))


def linears(sites: list[Site]) -> list[Site]:
    """What a LoRA sits on where nothing else is asked for."""
    return [site for site in sites if site.role in ("attention", "mlp") and site.kind == "linear"]


def told(family: Family, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Conditions, with what the data adds to what is cached."""
    count = len(next(iter(conditions.values())))
    if family.wants_geometry:
        geometry = torch.tensor([640.0, 480.0, 0.0, 16.0, 64.0, 64.0])
        conditions = {**conditions, "geometry": geometry.expand(count, 6)}
    return conditions


def timesteps_of(family: Family, *shares: float) -> Tensor:
    """Timesteps at shares of the way from picture to noise."""
    if isinstance(family.process, Flow):
        return torch.tensor(shares) * family.process.steps
    return torch.tensor([round(share * (family.process.steps - 1)) for share in shares])


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
    if isinstance(family.process, Process):
        assert family.process.steps == len(family.process.alphas_cumprod)
    assert family.text_components == tuple(texts_of(kind))
    assert len(family.blocks) == 3
    assert len(family.encoder_dropout) in (0, len(family.text_components))
    assert family.usual_guidance >= 1
    assert family.usual_steps >= 1


@every_kind
def test_a_folder_that_is_another_model_is_refused(kind: str, tmp_path: Path):
    with pytest.raises(
        WeightsError, match=r"is no folder in diffusers layout, since it has no (unet|transformer)"
    ):
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


def every_site(kind: str) -> list[Site]:
    family = opened(kind)
    return [*family.sites(denoiser_of(kind)), *family.text_sites(texts_of(kind))]


@every_kind
def test_its_sites_are_layers_of_its_models(kind: str):
    family, sites = opened(kind), every_site(kind)
    models = {family.component: denoiser_of(kind), **texts_of(kind)}
    assert len({site.name for site in sites}) == len(sites)
    for site in sites:
        layer: Any = layer_at(models, site)
        assert (site.kind == "norm") == (site.role == "norm"), site
        if site.kind == "linear":
            assert isinstance(layer, nn.Linear)
            assert (layer.in_features, layer.out_features) == (site.inputs, site.outputs)
        elif site.kind == "conv":
            assert isinstance(layer, nn.Conv2d)
            assert (layer.in_channels, layer.out_channels) == (site.inputs, site.outputs)
            found = (layer.kernel_size, layer.stride, layer.padding)
            assert found == (site.kernel, site.stride, site.padding)
        else:
            assert tuple(layer.weight.shape) == (site.inputs,) == (site.outputs,)


@every_kind
def test_its_sites_are_all_that_carry_weights_in_the_order_of_the_model(kind: str):
    family, denoiser = opened(kind), denoiser_of(kind)
    listed = [site.name.partition(".")[2] for site in family.sites(denoiser)]
    able = [
        path for path, layer in denoiser.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    assert [path for path in listed if path in set(able)] == able


@every_kind
def test_its_blocks_are_counted_within_what_it_says(kind: str):
    family = opened(kind)
    sites = family.sites(denoiser_of(kind))
    first = 0
    last = sum(family.blocks) - 1 + 2 * family.block_ends
    held = [site.block for site in sites if site.block is not None]
    assert held
    assert first <= min(held) <= max(held) <= last
    for site in sites:
        if site.role in ("attention", "mlp"):
            assert site.block is not None
            assert site.section
    assert all(site.block is None for site in family.text_sites(texts_of(kind)))


@every_kind
def test_each_layer_has_its_own_place_in_a_file(kind: str):
    """Where several layers are joined in one, their rows are all of it, and none twice."""
    family, sites = opened(kind), every_site(kind)
    joined: dict[str, list[tuple[int, int, int]]] = {}
    alone = set()
    for site in sites:
        place = family.place(site.name)
        prefix = "lora_unet" if site.component == family.component else "lora_te"
        assert place.prefix.startswith(prefix)
        if place.rows is None:
            assert place.kohya not in alone, site
            alone.add(place.kohya)
        else:
            assert place.rows[1] - place.rows[0] == site.outputs
            joined.setdefault(place.kohya, []).append(place.rows)
    assert not alone & joined.keys()
    for name, rows in joined.items():
        ends = sorted(rows)
        assert ends[0][0] == 0, name
        assert ends[-1][1] == ends[-1][2], name
        assert all(one[1] == other[0] for one, other in pairwise(ends)), name
        assert len({whole for _, _, whole in rows}) == 1, name


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
    if kind in TRAINED:
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
    conditions = told(
        family, {word: torch.from_numpy(array).to(dtype) for word, array in captions.items()}
    )
    side = family.size_step // family.pixels_per_latent
    for height, width in ((side, side), (2 * side, 3 * side)):
        latents = torch.linspace(-1, 1, 2 * family.latent_channels * height * width)
        noisy = latents.view(2, family.latent_channels, height, width).to(dtype)
        timesteps = timesteps_of(family, 0.0, 1.0)
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
def test_facts_follow_the_weights_and_not_the_place(kind: str, tmp_path: Path):
    family = opened(kind)
    before = family.encoder_facts()
    texts = [*family.text_components]
    texts += [name.replace("text_encoder", "tokenizer") for name in family.text_components]
    for part, changed in {"vae": 0, **dict.fromkeys(texts, 1)}.items():
        folder = tmp_path / part
        shutil.copytree(tiny_folder(kind), folder)
        assert open_tiny(kind, folder).encoder_facts() == before
        file = max((folder / part).iterdir(), key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[-2] ^= 1
        file.write_bytes(data)
        after = open_tiny(kind, folder).encoder_facts()
        assert after[changed] != before[changed], part
        assert after[1 - changed] == before[1 - changed], part


def usual(family: Family) -> dict[str, Any]:
    """How previews of a family are drawn where a job says nothing of it."""
    return {
        "sampler": family.usual_sampler,
        "process": family.process,
        "embedded_guidance": family.usual_embedded_guidance,
    }


@pytest.mark.slow
@every_kind
def test_its_pipeline_is_that_of_diffusers_around_the_models_it_is_given(kind: str):
    from diffusers import DiffusionPipeline

    family, denoiser, encoders = opened(kind), denoiser_of(kind), texts_of(kind)
    pipeline = family.load_pipeline(denoiser, encoders, dtype=torch.float32, device=CPU)
    assert isinstance(pipeline, DiffusionPipeline)
    assert type(pipeline).__module__.startswith("diffusers.")
    told = json.loads((tiny_folder(kind) / "model_index.json").read_text())
    assert type(pipeline).__name__ == told["_class_name"]
    assert getattr(pipeline, family.component) is denoiser
    assert all(getattr(pipeline, name) is encoder for name, encoder in encoders.items())
    own = family.load_pipeline(dtype=torch.bfloat16, device=CPU)
    for name in (family.component, "vae", *family.text_components):
        held, original = getattr(own, name), getattr(pipeline, name).state_dict()
        assert held is not getattr(pipeline, name)
        assert held.state_dict().keys() == original.keys()
        for word, weight in held.state_dict().items():
            assert torch.equal(weight, original[word].to(weight.dtype)), f"{name}.{word}"
        assert next(held.parameters()).dtype == torch.bfloat16
        # nothing of raylora's in their forward passes: what it is compared with is diffusers' alone
        assert not any("forward" in vars(module) for module in held.modules()), name


@pytest.mark.slow
@every_kind
def test_a_renderer_draws_the_size_it_is_given(kind: str):
    family, denoiser = opened(kind), denoiser_of(kind)
    side = 2 * family.size_step // family.pixels_per_latent
    latents = torch.linspace(-2, 2, family.latent_channels * side * side)
    latents = latents.view(1, family.latent_channels, side, side)
    renderer = family.load_renderer(denoiser, dtype=torch.float32, device=CPU)
    drawn = [
        renderer.render(
            prompt, negative="", latents=latents, steps=2, guidance=3.0, **usual(family)
        )
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
def test_skeletons_have_the_layers_and_no_weights(kind: str):
    family = opened(kind)
    denoiser, encoders = family.skeletons()
    for model in (denoiser, *encoders.values()):
        assert all(weight.is_meta for weight in model.parameters())
    assert encoders.keys() == texts_of(kind).keys()
    assert family.sites(denoiser) == family.sites(denoiser_of(kind))
    assert family.text_sites(encoders) == family.text_sites(texts_of(kind))


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
def test_gradients_reach_every_layer_of_the_text_encoders_that_is_read(kind: str):
    family, encoders = opened(kind), texts_of(kind)
    network = get_network("lora")
    sites = linears(family.text_sites(encoders))
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
    unread = {site.name for site in sites if not _is_read(family, encoders, site)}
    assert len(unread) < len(sites) / 2
    for site, held in adapter.parameters.items():
        for word, leaf in held.items():
            if site not in unread:
                assert leaf.grad is not None
                assert leaf.grad.any(), f"{site} {word}"
    assert all(weight.grad is None for one in encoders.values() for weight in one.parameters())


def _is_read(family: Family, encoders: Models, site: Site) -> bool:
    """Whether the conditions are others once the layer gives nothing."""
    layer = layer_at(encoders, site)
    with torch.no_grad():
        before = read(family, encoders, CAPTIONS)
        hook = layer.register_forward_hook(lambda module, given, output: output * 0)
        after = read(family, encoders, CAPTIONS)
    hook.remove()
    return any(not torch.equal(before[word], after[word]) for word in before)


@every_kind
def test_checkpointed_blocks_keep_less_and_give_the_same_gradients(kind: str):
    family = opened(kind)
    found: list[tuple[int, Tensor]] = []
    for on in (False, True):
        denoiser = family.load_denoiser(dtype=torch.float32, device=CPU)
        encoders = family.load_text_encoders(dtype=torch.float32, device=CPU)
        if on:
            units = {family.component: family.units(denoiser), **family.text_units(encoders)}
            for component, model in {family.component: denoiser, **encoders}.items():
                Placed(model, units[component], device=CPU).apply(Setting("all"))
        network = get_network("lora")
        sites = linears([*family.sites(denoiser), *family.text_sites(encoders)])
        sites = [site for site in sites if site.role == "attention"]
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
                denoiser, noisy, timesteps_of(family, 0.5), told(family, conditions)
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
    given, own = (
        family.load_renderer(denoiser, encoders, dtype=torch.float32, device=CPU),
        family.load_renderer(denoiser, dtype=torch.float32, device=CPU),
    )

    def drawn() -> list[np.ndarray]:
        return [
            one.render(
                "a cat", negative="", latents=latents, steps=2, guidance=3.0, **usual(family)
            )
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
