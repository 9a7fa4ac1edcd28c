"""A trial's proof, without a cluster: compared is what people get, whatever was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import kohya_name
from small import ROOT, final_state, small_job, train_small
from torch.testing import assert_close

from raylora.adapt.deltas import delta
from raylora.adapt.lora_file import read_adapter
from raylora.adapt.trained import trained as copied
from raylora.campaign import Trial
from raylora.models import load_adapted, open_family
from raylora.on_ray.trial import _shown_at, prove_trial


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def trained(folder: Path, cache: str, **given: Any) -> Trial:
    """A trial of three steps of both models."""
    job = small_job(
        str(folder),
        **{
            "data__folder": str(ROOT / "jobs/quickstart/demo-data/holdout"),
            "data__cache": cache,
            "network__train": "both",
            "network__rank": 4,
            "export__dtype": "float32",
            "schedule__name": "constant",
            "schedule__warmup_steps": 0,
            "training__images_per_step": 1,
            "training__steps": 3,
            **given,
        },
    )
    train_small(job)
    return Trial(0, {}, job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "shows_what_is_trained"),
    [
        ({}, True),
        ({"ema__decay": 0.9}, False),
        ({"optimizer": {"name": "adamw_schedule_free"}}, False),
        ({"optimizer": {"name": "adafactor"}, "schedule": {"name": "adafactor"}}, True),
        ({"optimizer": {"lora_plus_ratio": 4, "text_encoder_rate": 1e-3}}, True),
    ],
    ids=str,
)
def test_what_is_proven_is_what_the_file_holds(
    tmp_path: Path, cache: str, given: dict[str, Any], shows_what_is_trained: bool
) -> None:
    trial = trained(tmp_path, cache, **given)
    job = trial.job
    shown = _shown_at(trial, 3)
    file = read_adapter(trial.storage.read("checkpoints/000003/adapter.safetensors"))
    assert {kohya_name(site.name) for site in shown.sites} == file.modules.keys()
    for site in shown.sites:
        pair = shown.low_rank(site)
        assert pair is not None
        assert_close(delta(*pair), file.delta(kohya_name(site.name)), rtol=1e-6, atol=1e-9)
    adapter = load_adapted(job, open_family(job), torch.device("cpu")).adapter
    adapter.values.data.copy_(final_state(job)["values"])
    alike = all(
        torch.equal(held["up"], shown.parameters[name]["up"])
        for name, held in copied(adapter).parameters.items()
    )
    assert alike == shows_what_is_trained


@pytest.mark.slow
def test_diffusers_proves_a_trial_of_both_models_whose_average_is_shown(
    tmp_path: Path, cache: str
) -> None:
    trial = trained(tmp_path, cache, ema__decay=0.9, network__kind="locon")
    report = prove_trial(trial, str(tmp_path / "elsewhere"))
    assert (report["trial"], report["steps"]) == (trial.job.name, 3)
    assert report["modules"] == len(_shown_at(trial, 3).sites)
    assert report["worst_error"] < 1e-6  # the file holds fp32
