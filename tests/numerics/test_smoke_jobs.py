"""Each family's smoke job goes the whole road, and its file does in diffusers what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bases import random_folder
from PIL import Image
from programs import ROOT
from small import final_state
from torch import Tensor

from raylora.base.lookup import plugins
from raylora.job import Job, load_job, with_overrides
from raylora.local import train
from raylora.models import load_adapted, open_family

CPU = torch.device("cpu")
PROMPT = "ink icon, red heart, symbol"


def smoke_job(kind: str, store: Path) -> Job:
    """The job as it is, on the base that the tests made, whose path is none of the repository's."""
    return with_overrides(
        load_job(ROOT / "jobs" / "smoke" / f"{kind}.yaml"),
        {"family.weights": str(random_folder(kind)), "store": str(store)},
    )


def drawn_latents(pipeline: Any) -> Tensor:
    """The latents of a picture after four steps, as the pipeline itself draws it."""
    drawn: Tensor = pipeline(
        PROMPT,
        width=64,
        height=48,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    return drawn


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.slow
@pytest.mark.parametrize("kind", plugins("raylora.families"))
def test_a_family_is_trained_drawn_saved_and_read_by_its_pipeline(kind: str, tmp_path: Path):
    from diffusers import DiffusionPipeline

    job = smoke_job(kind, tmp_path)
    torch.set_num_threads(1)
    result = train(job)  # with the proof of each file that it saves
    assert result["steps"] == 20
    assert result["validation_last"] < result["validation_first"]

    run = tmp_path / job.run_folder
    before, after = (
        np.asarray(Image.open(run / f"samples/{step:06d}/000.png")) for step in (0, 20)
    )
    assert before.shape == after.shape == (64, 64, 3)
    assert (before != after).mean() > 0.01

    family = open_family(job)
    models = load_adapted(job, family, CPU)
    with torch.no_grad():
        models.adapter.values.copy_(final_state(job)["values"])
    trained = family.load_pipeline(
        models.denoiser, models.text_encoders or None, dtype=torch.float32, device=CPU
    )
    trained.set_progress_bar_config(disable=True)
    pipeline = DiffusionPipeline.from_pretrained(job.family.weights, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    base = drawn_latents(pipeline)
    with models.adapter.off():
        assert distance(drawn_latents(trained), base) < 1e-5
    pipeline.load_lora_weights(run, weight_name=f"{job.name}.safetensors")
    moved = drawn_latents(pipeline)
    measured = drawn_latents(trained)
    assert distance(measured, base) > 0.01  # there is an effect
    assert distance(moved, measured) < 1e-5
