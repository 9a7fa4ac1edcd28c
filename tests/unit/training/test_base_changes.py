"""What a run starts from: LoRAs merged into the base, first weights from a file, a drawn seed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import kohya_name
from small import MakeJob, open_run, train_small
from torch.testing import assert_close

from raylora.adapt.attach import Adapter
from raylora.adapt.deltas import delta
from raylora.adapt.lora_file import AdapterModule, read_adapter, write_adapter
from raylora.adapt.trained import trained
from raylora.assemble import open_store
from raylora.base.errors import JobError, WeightsError
from raylora.check import check_job
from raylora.job import Job
from raylora.models import load_adapted, open_family, with_seed
from raylora.training.step import train_step

CPU = torch.device("cpu")


def trained_file(make_job: MakeJob, folder: Path, **given: Any) -> Path:
    """A LoRA of two steps, in float32."""
    job = make_job(name="first", training__steps=2, export__dtype="float32", **given)
    train_small(job)
    path = folder / "first.safetensors"
    path.write_bytes(open_store(job).read("first.safetensors"))
    return path


def changes(job: Job) -> dict[str, torch.Tensor]:
    """ΔW of every layer before the first step, by the file's names."""
    adapter = load_adapted(job, open_family(job), CPU).adapter
    return {kohya_name(site): change for site, change in deltas(adapter).items()}


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    """ΔW of every layer."""
    held = trained(adapter)
    pairs = {site.name: held.low_rank(site) for site in held.sites}
    return {name: delta(*pair) for name, pair in pairs.items() if pair is not None}


@pytest.mark.slow
def test_a_run_goes_on_from_a_file_with_exactly_its_change(make_job: MakeJob, tmp_path: Path):
    path = trained_file(make_job, tmp_path, network__rank=4, network__alpha=2.0)
    held = read_adapter(path)
    start = {"network__initial": str(path), "network__rank": 4, "training__precision": "fp64"}
    for alpha in (2.0, 8.0):
        found = changes(make_job(network__alpha=alpha, **start))
        assert found.keys() == held.modules.keys()
        for name, change in found.items():
            assert_close(change, held.delta(name), rtol=1e-6, atol=1e-12)


@pytest.mark.slow
def test_ranks_and_alphas_are_the_files_where_that_is_asked_for(make_job: MakeJob, tmp_path: Path):
    path = trained_file(
        make_job,
        tmp_path,
        network={"kind": "locon", "rank": 4, "alpha": 2.0, "conv_rank": 2, "conv_alpha": 1.0},
    )
    kind = {"kind": "locon", "initial": str(path)}
    refused = check_problems(make_job(network={**kind, "rank": 8}))
    assert "network.initial has other ranks than this job" in refused
    assert "network.initial_ranks: true" in refused
    job = make_job(name="second", network={**kind, "initial_ranks": True})
    adapter = load_adapted(job, open_family(job), CPU).adapter
    ranks = {len(held["down"]) for held in adapter.parameters.values()}
    assert ranks == {2, 4}
    for name, change in changes(job).items():
        assert_close(change, read_adapter(path).delta(name), rtol=1e-6, atol=1e-9)
    train_small(job)  # saved and read back by all that a run needs


def check_problems(job: Job) -> str:
    with pytest.raises(JobError) as caught:
        check_job(job)
    return str(caught.value)


@pytest.mark.slow
def test_what_a_file_has_and_the_job_does_not_train_is_refused_before_training(
    make_job: MakeJob, tmp_path: Path
):
    path = trained_file(make_job, tmp_path, network__train="both", network__rank=4)
    told = check_problems(make_job(network__initial=str(path), network__rank=4))
    assert "network.train: both" in told
    absent = check_problems(make_job(network__initial=str(tmp_path / "absent.safetensors")))
    assert "network.initial: there is no file" in absent
    both = make_job(network__initial=str(path), network__rank=4, network__train="both")
    assert len(changes(both)) == len(read_adapter(path).modules)


@pytest.mark.slow
def test_a_lora_merged_into_the_base_is_that_lora_at_its_strength(
    make_job: MakeJob, tmp_path: Path
):
    path = trained_file(make_job, tmp_path, network={"kind": "locon", "rank": 4, "train": "both"})
    file = read_adapter(path)
    plain = make_job(training__precision="fp64")
    merged = make_job(
        training__precision="fp64", family__loras=[{"file": str(path), "strength": 0.5}]
    )
    base, changed = open_family(plain), open_family(merged)
    weights = [
        family.load_denoiser(dtype=torch.float64, device=CPU).state_dict()
        for family in (base, changed)
    ]
    texts = [
        family.load_text_encoders(dtype=torch.float64, device=CPU)["text_encoder"].state_dict()
        for family in (base, changed)
    ]
    seen = 0
    for before, after in (weights, texts):
        for key, tensor in before.items():
            name = "lora_unet_" if before is weights[0] else "lora_te_text_model_"
            name += key.removeprefix("text_model.").removesuffix(".weight").replace(".", "_")
            expected = tensor
            if name in file.modules:
                seen += 1
                expected = tensor + 0.5 * file.delta(name).reshape(tensor.shape)
            assert_close(after[key], expected, rtol=0, atol=1e-14)
    assert seen == len(file.modules)
    assert base.fingerprint() != changed.fingerprint()
    (latents, text), (same, other) = base.encoder_facts(), changed.encoder_facts()
    assert latents == same
    assert text != other, "captions encoded by another text encoder have other names"


@pytest.mark.slow
def test_a_lora_of_the_denoiser_alone_leaves_cached_captions_as_they_are(
    make_job: MakeJob, tmp_path: Path
):
    path = trained_file(make_job, tmp_path, network__rank=4)
    base = open_family(make_job())
    merged = open_family(make_job(family__loras=[{"file": str(path)}]))
    assert base.encoder_facts() == merged.encoder_facts()
    assert base.fingerprint() != merged.fingerprint()
    weaker = open_family(make_job(family__loras=[{"file": str(path), "strength": 0.9}]))
    assert weaker.fingerprint() != merged.fingerprint()


def test_a_lora_for_another_base_is_refused_by_the_check(make_job: MakeJob, tmp_path: Path):
    tensors = {
        "lora_down.weight": torch.ones(2, 6),
        "lora_up.weight": torch.ones(6, 2),
        "alpha": torch.tensor(2.0),
    }
    path = tmp_path / "other.safetensors"
    write_adapter(
        path, [AdapterModule("lora_unet_nowhere_to_q", copy.copy(tensors))], {}, dtype=torch.float32
    )
    told = check_problems(make_job(family__loras=[{"file": str(path)}]))
    assert "lora_unet_nowhere_to_q" in told
    with pytest.raises(WeightsError, match=r"family\.loras\.0\.file: there is no file"):
        open_family(make_job(family__loras=[{"file": str(tmp_path / "absent.safetensors")}]))


@pytest.mark.slow
def test_a_blank_seed_is_drawn_once_and_recorded(make_job: MakeJob):
    blank = make_job(name="blank", training__seed=None, training__steps=2)
    assert blank.training.seed is None
    train_small(blank)
    storage = open_store(blank)
    recorded = with_seed(blank).training.seed
    assert recorded is not None
    assert f"seed: {recorded}" in storage.read("job.yaml").decode()
    file = read_adapter(storage.read("blank.safetensors"))
    assert file.metadata["ss_seed"] == str(recorded)
    assert train_small(blank)["already_done"]
    others = {with_seed(make_job(name=f"other-{i}", training__seed=None)).seed for i in range(4)}
    assert len(others | {recorded}) == 5


def test_a_negative_rate_goes_the_other_way(make_job: MakeJob):
    moves = {}
    for rate in (1e-3, -1e-3):
        run = open_run(
            make_job(
                training__precision="fp64",
                training__images_per_step=1,
                optimizer={"name": "sgd_nesterov", "learning_rate": rate},
            )
        )
        before = run.parts.adapter.values.detach().clone()
        train_step(run.parts, 3)
        moves[rate] = run.parts.adapter.values.detach() - before
        run.close()
    assert moves[1e-3].abs().max() > 0
    assert_close(moves[-1e-3], -moves[1e-3], rtol=1e-12, atol=1e-18)


@pytest.mark.slow
def test_after_every_step_no_layer_is_above_the_cap(make_job: MakeJob):
    run = open_run(
        make_job(
            network__max_norm=0.05, training__images_per_step=1, schedule__warmup_steps=0,
            network={"kind": "locon", "rank": 4, "alpha": 8.0, "max_norm": 0.05},
        )
    )  # fmt: skip
    for number in range(3):
        result = train_step(run.parts, number)
    norms = [float(change.norm()) for change in deltas(run.parts.adapter).values()]
    assert max(norms) == pytest.approx(0.05, rel=1e-4)
    assert float(result.extra["largest_norm"]) == pytest.approx(0.05, rel=1e-4)
    assert int(result.extra["capped_layers"]) > 0
    run.close()
