"""In which batches a step is computed, and whether twice, changes no result of any family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bases import random_folder
from small import ROOT, open_run
from torch import Tensor
from torch.testing import assert_close

from raylora.job import Job, load_job, with_overrides
from raylora.training.step import train_step

DROPPED = {"dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2}
SLICES: dict[str, Any] = {"kind": "dylora", "rank": 4, "unit": 2, **DROPPED}
KEPT = {
    "data.folder": None,
    "data.sets": [
        {"folder": str(ROOT / "jobs/quickstart/demo-data/holdout")},
        {
            "folder": str(ROOT / "jobs/quickstart/demo-data/train"),
            "is_reg": True,
            "output_preservation": True,
        },
    ],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15, chunks": (
        "sd15",
        {"family.max_tokens": 225, "network": {**SLICES, "train": "both"}},
    ),
    "sd2": ("sd2", {"network": {**SLICES, "train": "both"}}),
    "sdxl, chunks, preserved": (
        "sdxl",
        {"family.max_tokens": 150, "network": {**SLICES, "train": "both"}, **KEPT},
    ),
    "sd3, left out": (
        "sd3",
        {f"family.{one}_dropout": 0.3 for one in ("clip_l", "clip_g", "t5")}
        | {"network": {**SLICES, "train": "both"}}
        | {"network.text_encoders": ["text_encoder", "text_encoder_2", "text_encoder_3"]},
    ),
    "flux1, masked": (
        "flux1",
        {"family.mask_t5": True, "network": {**SLICES, "train": "both"}}
        | {"network.text_encoders": ["text_encoder", "text_encoder_2"]},
    ),
    "dora": ("sd3", {"network": {"kind": "dora", "dropout": 0.2, "rank_dropout": 0.2}}),
    "locon": ("sdxl", {"network": {"kind": "locon", "tucker": True, **DROPPED}}),
    "loha": ("sdxl", {"network": {"kind": "loha", "module_dropout": 0.2, "layers": "all"}}),
    "lokr": ("flux1", {"network": {"kind": "lokr", "rank": 2, "module_dropout": 0.2}}),
    "oft": ("flux1", {"network": {"kind": "oft", "rescale": True, "module_dropout": 0.2}}),
    "boft": ("sd3", {"network": {"kind": "lycoris", "algo": "boft", "module_dropout": 0.2}}),
    "glora": ("sdxl", {"network": {"kind": "lycoris", "algo": "glora", "module_dropout": 0.2}}),
    "full": ("sdxl", {"network": {"kind": "lycoris", "algo": "full", "module_dropout": 0.2}}),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def job_of(name: str, store: Path, cache: str, more: dict[str, Any]) -> Job:
    family, given = CASES[name]
    bare = {
        "family.weights": str(random_folder(family)),
        "store": str(store),
        "data.cache": cache,
        "optimizer.text_encoder_rate": None,
        "optimizer.learning_rate": 1e-3,
        "training.steps": 2,
        "training.images_per_step": 4,
        "training.save_every_steps": None,
        "schedule.warmup_steps": 0,
        "validation.folder": None,
        "preview.prompts": [],
        "export.naming": "kohya",
    }
    job = load_job(ROOT / "jobs" / "smoke" / f"{family}.yaml")
    return with_overrides(job, {**bare, **given, **more})


def step(job: Job) -> tuple[Tensor, Tensor]:
    """Gradients and loss of a step that begins from numbers that are nowhere zero."""
    run = open_run(job)
    try:
        values = run.parts.adapter.values
        with torch.no_grad():
            values += 0.02 * torch.sin(torch.arange(len(values), dtype=values.dtype))
        before = torch.get_rng_state()
        loss = train_step(run.parts, 0).loss
        assert torch.equal(torch.get_rng_state(), before), "something drew from torch's generator"
        return run.parts.adapter.gradients.clone(), loss
    finally:
        run.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_same_in_any_micro_batch_and_checkpointed(
    name: str, tmp_path: Path, cache: str
):
    exact = {"training.precision": "fp64"}
    alone = step(job_of(name, tmp_path, cache, {**exact, "memory.max_micro_batch": 1}))
    whole = {**exact, "memory.max_micro_batch": 4}
    together = step(job_of(name, tmp_path, cache, whole))
    again = step(job_of(name, tmp_path, cache, {**whole, "memory.checkpointing": "all"}))
    assert_close(together[1], alone[1], rtol=1e-10, atol=0)
    size = float(alone[0].norm())
    assert size > 0
    # float64 has 53 bits, and sizes and timesteps are embedded in float32 either way.
    assert float((together[0] - alone[0]).norm()) <= 1e-8 * size
    assert torch.equal(again[1], together[1])
    assert torch.equal(again[0], together[0])
