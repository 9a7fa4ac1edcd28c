"""A frozen adapter under the trained one: there while training, not there for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import random_module
from small import MakeJob, open_run, saved_file, train_small
from torch import Tensor
from torch.testing import assert_close

from raylora.adapt.lora_file import AdapterModule, read_adapter, write_adapter
from raylora.adapt.onto import all_sites, onto
from raylora.assemble import content, open_store
from raylora.base.errors import JobError
from raylora.base.site import Site
from raylora.check import check_job
from raylora.families import Family
from raylora.job import Job
from raylora.local import cache_here
from raylora.models import open_family
from raylora.training.parts import Parts
from raylora.training.step import losses_at, train_step

CPU = torch.device("cpu")
KINDS = ("attn1.to_q", "ff.net.2", "proj_in", "resnets.0.conv1")
PICTURES: dict[str, Any] = {
    "preview__prompts": ["ink icon, cat", "ink icon, dog --am 0.5"],
    "preview__steps": 3,
}


def shape_of(site: Site) -> tuple[int, ...]:
    return (site.outputs, site.inputs, *(site.kernel if site.kind == "conv" else ()))


def some_sites(family: Family, kinds: tuple[str, ...] = KINDS) -> list[Site]:
    sites = family.sites(family.skeletons()[0])
    return [next(site for site in sites if kind in site.name) for kind in kinds]


@pytest.fixture
def file(make_job: MakeJob, tmp_path: Path) -> Path:
    """A LoRA with one layer of each kind, among them some that the job does not train."""
    family = open_family(make_job())
    modules = [
        AdapterModule(family.place(site.name).kohya, random_module("", shape_of(site)).tensors)
        for site in some_sites(family)
    ]
    path = tmp_path / "beneath.safetensors"
    write_adapter(path, modules, {}, dtype=torch.float32)
    return path


def merged(family: Family, path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The base with the file added to its weights: the other way to the same model."""
    denoiser = family.load_denoiser(dtype=dtype, device=CPU)
    modules, left = onto(read_adapter(path), family.sites(denoiser), family.place)
    assert left == []
    assert len(modules) == len(KINDS)
    for name, module in modules.items():
        weight: Any = denoiser.get_submodule(name.partition(".")[2]).weight
        down, up, scale = module.low_rank
        change = scale * up.double().flatten(1) @ down.double().flatten(1)
        weight.data = (weight.double() + change.view(weight.shape)).to(dtype)
    return denoiser


def asked(parts: Parts) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64).to(parts.dtype)
    width = next(iter(parts.loader.take(0)[1]))["text"].shape[-1]
    text = torch.randn(2, 77, width, generator=generator, dtype=torch.float64).to(parts.dtype)
    return noisy, torch.tensor([100, 800]), {"text": text}


@torch.no_grad()
def predict(parts: Parts, denoiser: Any = None) -> Tensor:
    return parts.predict(denoiser or parts.denoiser, *asked(parts))


@pytest.mark.slow
def test_training_sees_base_and_file_and_people_the_base_to_the_bit(make_job: MakeJob, file: Path):
    job = make_job(family__training_adapter=str(file), training__precision="fp64")
    run, family = open_run(job), open_family(job)
    parts = run.parts
    base = predict(parts, family.load_denoiser(dtype=torch.float64, device=CPU))
    both = predict(parts, merged(family, file, torch.float64))
    assert float((both - base).abs().max()) > 1e-3
    assert_close(predict(parts), both, rtol=1e-9, atol=1e-12)
    with parts.as_drawn():
        assert torch.equal(predict(parts), base)
    with parts.adapter.off():
        assert_close(predict(parts), both, rtol=1e-9, atol=1e-12)  # what preserved images keep to
    with torch.no_grad():
        parts.adapter.values += 0.05 * torch.sin(torch.arange(len(parts.adapter.values)))
    alone = open_run(make_job(training__precision="fp64"))
    with torch.no_grad():
        alone.parts.adapter.values.copy_(parts.adapter.values)
    with parts.as_drawn():
        assert torch.equal(predict(parts), predict(alone.parts))
    assert not torch.allclose(predict(parts), predict(alone.parts), atol=1e-3)
    run.close()
    alone.close()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_trained_adapter_moves_by_the_gradients_of_base_and_file(
    make_job: MakeJob, file: Path, checkpointing: bool
):
    job = make_job(
        family__training_adapter=str(file),
        training__precision="fp64",
        memory__checkpointing="all" if checkpointing else "none",
    )
    run = open_run(job)
    parts, family = run.parts, open_family(job)
    assert parts.under is not None
    before = parts.under.constants.clone()
    assert len(parts.under.values) == 0
    _, tensors, _ = parts.loader.take(0)
    batch = {word: torch.from_numpy(held.copy())[None] for word, held in tensors[0].items()}
    noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([500])
    with torch.no_grad():
        parts.adapter.values += 0.05 * torch.sin(torch.arange(len(parts.adapter.values)))
    losses_at(parts, batch, noise, timesteps).sum().backward()
    found = parts.adapter.gradients.clone()

    alone = open_run(make_job(training__precision="fp64"))
    # The same weights as one model: the file's share is in them.
    plain = {
        name: held.data for name, held in merged(family, file, torch.float64).named_parameters()
    }
    for name, held in alone.parts.denoiser.named_parameters():
        held.data.copy_(plain[name])
    with torch.no_grad():
        alone.parts.adapter.values.copy_(parts.adapter.values)
    losses_at(alone.parts, batch, noise, timesteps).sum().backward()
    assert_close(found, alone.parts.adapter.gradients, rtol=1e-6, atol=1e-10)
    assert float(found.abs().max()) > 0
    parts.adapter.gradients.zero_()
    train_step(parts, 0)
    assert torch.equal(parts.under.constants, before)
    run.close()
    alone.close()


@pytest.mark.slow
def test_previews_are_the_bases_and_the_file_is_the_trained_adapter_alone(
    make_job: MakeJob, file: Path
):
    words = {"training__steps": 2, "export__dtype": "float32", **PICTURES}
    with_file = make_job(name="with", family__training_adapter=str(file), **words)
    without = make_job(name="without", **words)
    train_small(with_file)
    train_small(without)
    first, second = (open_store(job) for job in (with_file, without))
    for number in range(2):
        key = f"samples/000000/{number:03d}.png"
        assert first.read(key) == second.read(key)
    ours, theirs = saved_file(with_file), saved_file(without)
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours), "it was trained so"


def test_a_run_keeps_to_one_file(make_job: MakeJob, file: Path):
    held = []
    for given in ({}, {"family__training_adapter": str(file)}):
        checked = check_job(make_job(**given))
        held.append(content(checked.family, cache_here(checked))["base"])
    assert len(set(held)) == 2
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    checked = check_job(make_job(family__training_adapter=str(file)))
    assert content(checked.family, cache_here(checked))["base"] not in held


def problem(job: Job) -> str:
    with pytest.raises(JobError) as caught:
        check_job(job)
    (found,) = caught.value.problems
    return found


def test_a_file_that_cannot_lie_under_the_adapter_is_told_before_training(
    make_job: MakeJob, tmp_path: Path
):
    family = open_family(make_job())
    (site,) = some_sites(family, ("attn1.to_q",))
    name = family.place(site.name).kohya
    path = tmp_path / "wrong.safetensors"
    job = make_job(family__training_adapter=str(path))
    start = f"family.training_adapter {path}: "
    assert problem(job).startswith(f"family.training_adapter: there is no file {path}")
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    (read,) = [one for one in all_sites(family) if family.place(one.name).kohya == text]
    held = random_module("", shape_of(read)).tensors
    write_adapter(path, [AdapterModule(text, held)], {}, dtype=torch.float32)
    assert problem(job).startswith(f"{start}it has 1 layers of text encoders, {read.name}, and a")
    other = random_module("", shape_of(site)).tensors
    nowhere = "lora_unet_down_blocks_9_attentions_0_proj_in"
    write_adapter(path, [AdapterModule(nowhere, other)], {}, dtype=torch.float32)
    assert problem(job).startswith(f"{start}the base has no such layer for 1 modules of the file")
    write_adapter(
        path, [AdapterModule("lora_unet_double_blocks_0_img_mlp_0", other)], {}, dtype=torch.float32
    )
    assert problem(job).startswith(f"{start}the LoRA is for FLUX.1, and the base is Stable Diff")
    other = random_module("", (site.outputs + 8, site.inputs)).tensors
    write_adapter(path, [AdapterModule(name, other)], {}, dtype=torch.float32)
    assert "The LoRA was trained on another base" in problem(job)
    dora = random_module("", shape_of(site)).tensors
    dora = {**dora, "dora_scale": torch.ones(1, site.inputs)}
    write_adapter(path, [AdapterModule(name, dora)], {}, dtype=torch.float32)
    assert "only LoRA and LoCon can lie under another adapter" in problem(job)
