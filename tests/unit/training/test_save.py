"""The saved file: what was trained, alpha in float32, the whole job in its header."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapters import kohya_name
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from small import MakeJob, open_run
from torch.testing import assert_close

from raylora.adapt.lora_file import read_adapter
from raylora.base.errors import ExportError
from raylora.job import job_from
from raylora.training.checkpoint import checkpoint_steps, read_checkpoint
from raylora.training.loop import Run, run_training
from raylora.training.state import held_state
from raylora.training.step import train_step


def trained_run(make_job: MakeJob, **more: Any) -> Run:
    run = open_run(make_job(training__steps=2, **more), report=True)
    for step in range(2):
        train_step(run.parts, step)
    return run


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_file_holds_what_was_trained_and_alpha_in_float32(make_job: MakeJob, dtype: str):
    run = trained_run(make_job, export__dtype=dtype, network__alpha=3.0)
    assert run.saver
    tensors = load_tensors(run.saver.file(run.parts, 2))
    run.close()
    adapter = run.parts.adapter
    assert len(tensors) == 3 * len(adapter.sites)
    for site in adapter.sites:
        name = kohya_name(site.name)
        alpha = tensors[f"{name}.alpha"]
        assert (alpha.dtype, alpha.shape, float(alpha)) == (torch.float32, (), 3.0)
        for word, leaf in adapter.parameters[site.name].items():
            held = tensors[f"{name}.lora_{word}.weight"]
            assert held.dtype == getattr(torch, dtype)
            assert held.dim() == (4 if site.kind == "conv" else 2)
            assert torch.equal(held.flatten(1), leaf.detach().to(held.dtype))


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_layers_are_named_as_the_job_asks(make_job: MakeJob, naming: str):
    run = open_run(make_job(export__naming=naming, network__rank=2), report=True)
    assert run.saver is not None
    file = read_adapter(run.saver.file(run.parts, 0))
    run.close()
    assert file.spelling == naming
    assert len(file.modules) == len(run.parts.adapter.sites)


def test_the_header_holds_the_whole_job(make_job: MakeJob, tmp_path):
    run = trained_run(make_job, name="icons", network__rank=4, network__alpha=2.0)
    assert run.saver
    path = tmp_path / "icons.safetensors"
    path.write_bytes(run.saver.file(run.parts, 2))
    run.close()
    with safe_open(path, framework="pt") as file:
        words = file.metadata()
    job = make_job(name="icons", network__rank=4, network__alpha=2.0, training__steps=2)
    assert job_from(json.loads(words["raylora.job"])) == job
    assert words["ss_network_dim"] == "4"
    assert float(words["ss_network_alpha"]) == 2.0
    assert words["ss_steps"] == "2"
    assert words["ss_base_model_version"] == "sd_v1"
    assert words["ss_seed"] == "7"
    assert words["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert "sshs_model_hash" in words


def test_a_checkpoint_has_the_file_and_the_exact_state(make_job: MakeJob):
    run = trained_run(make_job)
    assert run.saver
    run.saver.save(run.parts, 2, {"dataset": "d", "shares": [1.0], "looked": True})
    run.close()
    state = read_checkpoint(run.storage, 2)
    assert torch.equal(state.tensors["values"], run.parts.adapter.values.detach())
    held, facts = held_state(run.parts)
    assert state.tensors.keys() == held.keys()
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in held.items())
    assert state.facts["optimizer"] == facts["optimizer"]
    assert run.storage.read("checkpoints/000002/adapter.safetensors")


@pytest.mark.slow
def test_a_saved_file_is_proven_before_it_is_a_checkpoint(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
):
    from raylora.adapt.proof import ExportProver

    run = trained_run(make_job)
    assert run.saver
    run.saver._prover = ExportProver()
    try:
        report = run.saver.save(run.parts, 2, {"dataset": "", "shares": [], "looked": True})
        assert report is not None
        assert report.worst_error < 1e-3  # float16's 11 bits
        honest = run.parts.adapter.network.export

        def half_as_strong(*given: Any) -> Any:
            tensors = honest(*given)
            return {**tensors, "alpha": tensors["alpha"] / 2}

        network = run.parts.adapter.network
        spoiled = replace(network, export=half_as_strong)
        run.parts.adapter.network = spoiled
        with pytest.raises(ExportError):
            run.saver.save(run.parts, 3, {})
        assert checkpoint_steps(run.storage) == [2]
    finally:
        run.close()


@pytest.mark.slow
def test_the_finished_file_is_the_last_checkpoints(make_job: MakeJob):
    run = open_run(make_job(training__steps=1), report=True)
    run_training(run)
    run.close()
    file = run.storage.read("checkpoints/000001/adapter.safetensors")
    state = read_checkpoint(run.storage, 1).tensors["values"]
    held = load_tensors(file)
    first = run.parts.adapter.sites[0]
    down = held[f"{kohya_name(first.name)}.lora_down.weight"]
    assert_close(down.flatten().float(), state[: down.numel()], rtol=1e-3, atol=1e-6)
