"""Every option of bases, networks, timesteps, weights, rates, previews and files does something.

Each case sets one option to another value and looks at what a first step, a file and a picture are
made of. What changes none of them has to be refused; what nothing here is about has no case.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import random_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raylora.adapt.attach import Adapter, Attachment, first_weights, weights_in
from raylora.adapt.dropout import Dropout
from raylora.adapt.idle import refuse_idle
from raylora.adapt.keys import Naming
from raylora.adapt.layout import laid_out
from raylora.adapt.lora_file import AdapterModule, adapter_bytes
from raylora.adapt.norm_cap import NormCap
from raylora.adapt.onto import names_of
from raylora.base.errors import UserError
from raylora.base.layers import chosen_sites
from raylora.base.lookup import plugins
from raylora.base.seeds import draw_normal
from raylora.base.site import Site
from raylora.check import base_problems
from raylora.components.sites import site_of
from raylora.diffusion.losses import make_loss
from raylora.diffusion.timesteps import TimestepOptions, make_timesteps
from raylora.diffusion.weights import WeightOptions
from raylora.families import Family, FamilyOptions, get_family
from raylora.job import Job, job_from
from raylora.models import load_adapted, open_family
from raylora.networks import NetworkOptions, get_network
from raylora.optim.groups import make_groups, trained_sites
from raylora.preview.options import PreviewOptions, usual_of

CPU = torch.device("cpu")
SAMPLES = [3, 4]
KINDS = plugins("raylora.families")
NETWORKS = plugins("raylora.networks")


def same(one: Any, other: Any) -> bool:
    """Bit-equal, all the way down."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[word], other[word]) for word in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# -- networks: on a small model with a layer of each kind


class Small(nn.Module):
    """Layers of a UNet's two stretches, each asked alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.attn = nn.Linear(64, 64)
        self.ff = nn.Linear(128, 64)
        self.conv = nn.Conv2d(64, 128, 3, padding=1)
        self.norm = nn.LayerNorm(64)


ABOUT: dict[str, dict[str, Any]] = {
    "first": {"role": "attention", "section": "down", "number": 0, "block": 4},
    "attn": {"role": "attention", "section": "mid", "number": 0, "block": 12},
    "ff": {"role": "mlp", "section": "mid", "number": 0, "block": 12},
    "conv": {"role": "residual", "section": "mid", "number": 0, "block": 12},
    "norm": {"role": "norm", "section": "mid", "number": 0, "block": 12},
}


@cache
def small() -> tuple[Small, list[Site]]:
    torch.manual_seed(0)
    model = Small().requires_grad_(False)
    sites = [
        site_of(f"unet.{path}", getattr(model, path), **words) for path, words in ABOUT.items()
    ]
    return model, [site for site in sites if site is not None]


def carried(options: NetworkOptions) -> list[Site]:
    """The small model's layers that a network sits on."""
    found = chosen_sites(options, small()[1], convolutions=options.convolutions, blocks=(12, 1, 12))
    network = get_network(options.kind)
    found = [site for site in found if network.fits(options, site) is None]
    refuse_idle(options, found)
    return found


def network_step(given: Mapping[str, Any]) -> dict[str, Any]:
    """First weights, gradients, file and what a cap leaves, once the adapter has moved a little."""
    network = get_network(given["kind"])
    options = network.options(**{"layers": "all", **given})
    model, sites = small()[0], carried(options)
    adapter = Adapter(
        network,
        sites,
        first_weights(network, options, sites, seed=1, weight_of=weights_in({"unet": model})),
        {site.name: options.scale_at(site) for site in sites},
        dtype=torch.float32,
        device=CPU,
        constants={site.name: network.constants(options, site) for site in sites},
    )
    unit = network.unit(options)
    if options.dropout or options.rank_dropout or options.module_dropout or unit:
        adapter.dropout = Dropout(options, seed=1, unit=unit)
    start = adapter.values.detach().clone()
    adapter.values.data += 0.2 * noise(len(start))
    attachment = Attachment(model, "unet", adapter)
    with adapter.dropping(0, SAMPLES):
        for site in sites:
            shape = (2, site.inputs, 5, 5) if site.kind == "conv" else (2, 3, site.inputs)
            getattr(model, site.name.removeprefix("unet."))(noise(*shape)).square().sum().backward()
    attachment.detach()
    gradients, held = adapter.gradients.clone(), adapter.modules()
    if options.max_norm is not None:
        NormCap(adapter, options.max_norm).apply()
    return {
        "layers": [site.name for site in sites],
        "start": start,
        "gradients": gradients,
        "file": held,
        "capped": adapter.modules(),
    }


RANKS, ALPHAS = (2,) * 25, (1e-4,) * 25
OF_NETWORKS: dict[str, Any] = {
    "layers": "attention",
    "blocks": {"mid": "none"},
    "ranks": {"mlp": 2},
    "alphas": {"mlp": 1e-4},
    "block_ranks": RANKS,
    "block_alphas": ALPHAS,
    "conv_block_ranks": RANKS,
    "conv_block_alphas": ALPHAS,
    "rank": 2,
    "alpha": 1e-4,
    "dropout": 0.5,
    "rank_dropout": 0.5,
    "module_dropout": 0.5,
    "max_norm": 0.01,
    "scaling": "sqrt_rank",
    "freeze_down": True,
    "start": "pissa",
    "axis": "input",
    "norm_gradient": True,
    "unit": 2,
    "conv_rank": 1,
    "conv_alpha": 1,
    "tucker": True,
    "factor": 4,
    "decompose_both": True,
    "full_matrix": True,
    "unbalanced": True,
    "algo": "full",
    "rescale": True,
    "on_input": True,
}
BESIDE: dict[str, dict[str, Any]] = {
    "scaling": {"alpha": 1},
    "on_input": {"algo": "ia3"},
    "full_matrix": {"factor": 1},
    "tucker": {"rank": 3, "factor": 1},
    "decompose_both": {"rank": 3},
}
"""What an option needs beside it; words that a network has not are left out."""
ELSEWHERE = {"kind", "train", "text_encoders", "initial", "initial_ranks"}
"""The kind is what all are tried on; of the others tell test_layers.py and test_initial.py."""
HAVE_NONE = {
    "dora": {"module_dropout", "max_norm"},
    "dylora": set[str](),
    "locon": set[str](),
    "loha": {"dropout", "rank_dropout", "max_norm"},
    "lokr": {"dropout", "rank_dropout", "max_norm"},
    "lora": set[str](),
    "lycoris": {"max_norm"},
    "oft": {"dropout", "rank_dropout", "max_norm"},
}
"""Shared options that a network refuses."""


def words_of(kind: str) -> list[str]:
    return [word for word in get_network(kind).options.model_fields if word not in ELSEWHERE]


def beside(kind: str, word: str) -> dict[str, Any]:
    # The attention of the small model has whole blocks at any rank, which LoKr then refuses.
    unranked = kind == "lycoris" or word in (
        "full_matrix",
        *(["layers", "blocks"] * (kind == "lokr")),
    )
    usual = {} if unranked else {"rank": 4}
    held = {**usual, **BESIDE.get(word, {})}
    known = get_network(kind).options.model_fields
    return {"kind": kind, **{one: value for one, value in held.items() if one in known}}


@pytest.mark.parametrize(
    ("kind", "word"), [(kind, word) for kind in NETWORKS for word in words_of(kind)]
)
def test_an_option_of_a_network_changes_its_first_step(kind: str, word: str):
    if (kind, word) == ("lycoris", "rescale"):
        pytest.skip("of boft, below")
    plain = beside(kind, word)
    changed = {**plain, word: OF_NETWORKS[word]}
    if word in HAVE_NONE[kind]:
        with pytest.raises(ValueError, match=f"network.{word}"):
            network_step(changed)
        return
    assert not same(network_step(plain), network_step(changed))


OF_ALGORITHMS: dict[str, set[str]] = {
    "boft": {
        "rank",
        "alpha",
        "rescale",
        *(w for w in OF_NETWORKS if w.endswith(("ranks", "phas"))),
    },
    "ia3": {"on_input"},
    "full": set(),
    "norms": set(),
}
"""What each has of its own; layers, blocks and module_dropout are all algorithms'."""


@pytest.mark.parametrize("algo", OF_ALGORITHMS)
@pytest.mark.parametrize("word", [word for word in words_of("lycoris") if word != "algo"])
def test_an_option_of_lycoris_changes_an_algorithm_or_is_refused(algo: str, word: str):
    plain: dict[str, Any] = {"kind": "lycoris", "algo": algo}
    if algo == "norms":
        plain["layers"] = ["norm"]
    if algo == "norms" and word in ("layers", "blocks"):
        return  # the small model has one norm alone
    changed = {**plain, word: OF_NETWORKS[word]}
    if word in OF_ALGORITHMS[algo] | {"layers", "blocks", "module_dropout"}:
        assert not same(network_step(plain), network_step(changed))
        return
    with pytest.raises((UserError, ValueError), match=f"network.*{word}"):
        network_step(changed)


# -- timesteps, weights, rates, previews: on tiny bases, without their weights


def job_of(base: str, sections: Mapping[str, Any]) -> Job:
    kind = {"sd35": "sd3", "schnell": "flux1"}.get(base, base)
    tree: dict[str, Any] = {
        "name": "effects",
        "store": "nowhere",
        "family": {"kind": kind, "weights": str(random_folder(base))},
        "network": {"rank": 2, "layers": "attention_mlp"},
        "data": {"folder": "nowhere", "resolution": 64},
        "training": {"steps": 2, "images_per_step": 2, "seed": 1, "precision": "fp32"},
        "preview": {"prompts": ["a cat"]},
    }
    for section, words in sections.items():
        tree[section] = {**tree.get(section, {}), **words}
    return job_from(tree)


@cache
def opened(base: str) -> tuple[Family, list[Site], list[Site]]:
    """A base with its layers: the denoiser's, and the text encoders'."""
    family = open_family(job_of(base, {}))
    denoiser, encoders = family.skeletons()
    return family, family.sites(denoiser), family.text_sites(encoders)


def parts_step(base: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Timesteps, what they count, rates and pictures; UserError where the job is refused."""
    job, (family, inner, text) = job_of(base, sections), opened(base)
    if problems := base_problems(job, family):
        raise UserError(" ".join(problems))
    usual = job.timesteps.with_usual(family.usual_draw, family.usual_shift)
    source = make_timesteps(usual, family.process, family.base.config("scheduler"))
    timesteps = source.draw((32, 64), seed=1, step=0, samples=range(8))
    loss, zeros = make_loss(job.loss, family.process), torch.zeros(8, 1, 2, 2)
    counts, ends = family.blocks, family.block_ends
    sites = chosen_sites(
        job.network,
        inner + (text if job.network.trains_text else []),
        convolutions=False,
        blocks=counts,
        ends=ends,
    )
    kept = trained_sites(job.optimizer, sites, counts, ends=ends)
    words, images = ["down", "up"], job.training.images_per_step
    return {
        "timesteps": timesteps,
        "loss": loss(zeros, zeros + 0.5, timesteps, {}),
        "groups": make_groups(
            job.optimizer, kept, lambda site: words, images, counts, fast=("up",), ends=ends
        ),
        "pictures": job.preview.with_usual(usual_of(family, job.family)).pictures(),
    }


def has_effect(base: str, section: str, word: str, given: Mapping[str, Any], **beside: Any) -> bool:
    """Whether the word among those of a section changes anything."""
    plain = {one: value for one, value in given.items() if one != word}
    found, changed = (parts_step(base, {**beside, section: held}) for held in (plain, given))
    return not same(found, changed)


TIMESTEPS: dict[str, dict[str, Any]] = {
    "draw": {"draw": "sigmoid"},
    "sigmoid_scale": {"draw": "sigmoid", "sigmoid_scale": 1.1},
    "mean": {"draw": "logit_normal", "mean": 0.1},
    "std": {"draw": "logit_normal", "std": 1.1},
    "mode_scale": {"draw": "mode", "mode_scale": 1.0},
    "shift": {"shift": 1.5},
}


@pytest.mark.parametrize("base", ["sd15", "sd3", "flux1"])
@pytest.mark.parametrize("word", TimestepOptions.model_fields)
def test_an_option_of_timesteps_moves_them(base: str, word: str):
    if word == "draw":
        plain, changed = (
            parts_step(base, {"timesteps": {"draw": draw}}) for draw in ("uniform", "sigmoid")
        )
        assert not same(plain["timesteps"], changed["timesteps"])
    elif base == "sd15" and word == "shift":
        with pytest.raises(UserError, match=r"timesteps\.shift"):
            parts_step(base, {"timesteps": TIMESTEPS[word]})
    else:
        assert has_effect(base, "timesteps", word, TIMESTEPS[word])


NAMES = ("min_snr", "debiased", "sigma_sqrt", "cosmap", "x0")


@pytest.mark.parametrize("base", ["sd15", "sd3", "flux1"])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_counts_timesteps_otherwise_or_is_refused(base: str, name: str):
    if (name in ("min_snr", "debiased")) == (base == "sd15"):
        assert has_effect(base, "loss", "weight", {"weight": {"name": name}})
        return
    with pytest.raises(UserError, match=f"loss.weight.name is {name}"):
        parts_step(base, {"loss": {"weight": {"name": name}}})


def test_every_word_of_a_weight_is_tried():
    assert set(WeightOptions.model_fields) == {"name", "gamma"}
    plain, changed = (
        parts_step("sd15", {"loss": {"weight": {"name": "min_snr", "gamma": gamma}}})
        for gamma in (5.0, 1.0)
    )
    assert not same(plain["loss"], changed["loss"])


RATES: dict[str, Any] = {
    "denoiser_rate": 2e-4,
    "text_encoder_rate": 2e-5,
    "lora_plus_ratio": 4,
    "lora_plus_denoiser_ratio": 4,
    "lora_plus_text_encoder_ratio": 4,
    "scale_rate": "linear",
    "rates": {"mlp": 0.5},
}
STRETCHES = {
    "sd15": ("down", "mid", "up"),
    "sdxl": ("down", "mid", "up"),
    "sd3": ("joint",),
    "flux1": ("double", "single"),
}


@pytest.mark.parametrize("base", STRETCHES)
@pytest.mark.parametrize("word", RATES)
def test_an_option_of_rates_moves_some_layer_otherwise(base: str, word: str):
    train = {"network": {"train": "both"}}
    assert has_effect(base, "optimizer", word, {word: RATES[word]}, **train)


@pytest.mark.parametrize(
    ("base", "word"), [(base, word) for base, held in STRETCHES.items() for word in held]
)
def test_a_rate_of_blocks_is_of_blocks_that_the_base_has(base: str, word: str):
    given = {"block_rates": {word: 0.5}}
    assert has_effect(base, "optimizer", "block_rates", given)
    for other in {"down", "mid", "up", "double", "single", "joint"} - set(STRETCHES[base]):
        with pytest.raises(UserError, match=f"block_rates.{other} is given"):
            parts_step(base, {"optimizer": {"block_rates": {other: 0.5}}})


def test_each_text_encoder_has_a_rate():
    train = {"network": {"train": "both"}}
    plain, changed = (
        parts_step("sdxl", {**train, "optimizer": {"text_encoder_rate": rates}})["groups"]
        for rates in ([1e-4, 1e-4], [1e-4, 5e-5])
    )
    assert plain != changed


PICTURES: dict[str, Any] = {
    "negative": {"guidance": 3.0, "negative": "blue"},
    "seed": {"seed": 5},
    "steps": {"steps": 7},
    "guidance": {"guidance": 3.3},
    "embedded_guidance": {"embedded_guidance": 2.0},
    "width": {"width": 128},
    "height": {"height": 128},
    "sampler": {"sampler": "heun"},
    "strengths": {"strengths": (0.5,)},
}
NO_PICTURE = {"prompts", "prompts_file", "every_steps", "every_epochs", "at_start"}
"""What is drawn at all, and when."""


@pytest.mark.parametrize("base", ["sd15", "sdxl", "sd3", "flux1", "schnell"])
@pytest.mark.parametrize("word", [w for w in PreviewOptions.model_fields if w not in NO_PICTURE])
def test_an_option_of_previews_draws_another_picture(base: str, word: str):
    if word == "embedded_guidance" and base != "flux1":
        with pytest.raises(UserError, match="told no guidance"):
            parts_step(base, {"preview": PICTURES[word]})
        return
    assert has_effect(base, "preview", word, PICTURES[word])


# -- files


@pytest.mark.parametrize("kind", KINDS)
def test_each_naming_is_another_file_or_refused(kind: str):
    family, inner, text = opened(kind)
    sites = [one for one in [*inner, *text] if one.kind == "linear"]
    held = [
        AdapterModule(
            site.name,
            {
                "lora_down.weight": noise(2, site.inputs),
                "lora_up.weight": noise(site.outputs, 2),
                "alpha": torch.tensor(1.0),
            },
        )
        for site in sites
    ]
    names, files = names_of(family), set()
    namings: list[Naming] = ["kohya", "diffusers", "comfyui"]
    if kind in ("sd15", "sd2"):
        with pytest.raises(UserError, match="the same file"):
            job_of(kind, {"export": {"naming": namings.pop()}})
    for naming in namings:
        files.add(adapter_bytes(laid_out(held, names, naming), {}, dtype=torch.float32))
    assert len(files) == len(namings)


# -- bases: what the cache holds of captions and pictures, and what is predicted


def base_step(base: str, words: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions, latents and the adapted prediction of a base."""
    job = job_of(base, {"family": words})
    family = open_family(job)
    encoder = family.load_encoder(device=CPU)
    captions = ["a (red:1.5) cat " + "on paper " * 60, "a dog"]
    told = {name: torch.from_numpy(held) for name, held in encoder.encode_texts(captions).items()}
    pixels = draw_normal((1, 3, 16, 16), seed=0, step=0, sample=1, purpose="noise").clip(-1, 1)
    latents = torch.from_numpy(encoder.encode_images(pixels)["latents"])
    asked = {**told, "geometry": torch.full((2, 6), 64.0)} if family.wants_geometry else told
    if any(family.encoder_dropout):
        asked = {**told, "dropped": torch.tensor([[share > 0 for share in family.encoder_dropout]])}
        asked["dropped"] = asked["dropped"].float().expand(2, -1)
    models = load_adapted(job, family, CPU)
    times = torch.full((2,), 500)
    with torch.no_grad():
        predicted = family.predict(
            models.denoiser, latents.expand(2, *latents.shape[1:]), times, asked
        )
    return {"told": told, "latents": latents, "predicted": predicted}


@cache
def as_it_is(base: str) -> dict[str, Any]:
    return base_step(base, {})


OF_BASES: dict[str, Any] = {
    "max_tokens": 150,
    "weighted_captions": True,
    "clip_skip": 2,
    "guidance": 2.0,
    "t5_max_tokens": 100,
    "mask_clip": True,
    "mask_t5": True,
    "clip_l_dropout": 0.5,
    "clip_g_dropout": 0.5,
    "t5_dropout": 0.5,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (kind, word)
        for kind in KINDS
        for word in get_family(kind)[1].model_fields
        if word not in FamilyOptions.model_fields
    ],
)
def test_an_option_of_a_base_changes_what_is_read_or_predicted(kind: str, word: str):
    if (kind, word) == ("sdxl", "clip_skip"):
        with pytest.raises(UserError, match=r"family\.clip_skip is 1"):
            job_of(kind, {"family": {word: 1}})
        return
    assert not same(as_it_is(kind), base_step(kind, {word: OF_BASES[word]}))


def test_schnell_is_told_no_guidance():
    with pytest.raises(UserError, match=r"family\.guidance is 2"):
        base_step("schnell", {"guidance": 2.0})


def louder(folder: Path, place: Path) -> str:
    """A component with its weights a little larger."""
    shutil.copytree(folder, place)
    for file in place.glob("*.safetensors"):
        held = {name: tensor * 1.1 for name, tensor in load_file(file).items()}
        save_file(held, file, metadata={"format": "pt"})
    return str(place)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_parts_and_loras_change_a_base(kind: str, tmp_path: Path):
    base, plain = random_folder(kind), as_it_is(kind)
    vae = louder(base / "vae", tmp_path / "vae")
    assert not same(plain["latents"], base_step(kind, {"vae": vae})["latents"])
    text = louder(base / "text_encoder", tmp_path / "text")
    found = base_step(kind, {"parts": {"text_encoder": text}})
    assert not same(plain["told"], found["told"])
    models = load_adapted(job_of(kind, {}), opened(kind)[0], CPU)
    models.adapter.values.data += noise(len(models.adapter.values))
    held = [AdapterModule(name, tensors) for name, tensors in models.adapter.modules().items()]
    file = tmp_path / "lora.safetensors"
    laid = laid_out(held, names_of(opened(kind)[0]), "kohya")
    file.write_bytes(adapter_bytes(laid, {}, dtype=torch.float32))
    merged = base_step(kind, {"loras": [{"file": str(file), "strength": 0.5}]})
    assert not same(plain["predicted"], merged["predicted"])
    beneath = base_step(kind, {"training_adapter": str(file)})
    assert not same(plain["predicted"], beneath["predicted"])
    assert not same(merged["predicted"], beneath["predicted"])
