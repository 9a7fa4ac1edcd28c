"""Recorded micro-batches on a GPU: the numbers of those that are started kernel by kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bases import random_folder
from small import small_job
from torch.testing import assert_close

from raylora.adapt import attach
from raylora.assemble import make_run, open_store
from raylora.check import check_job
from raylora.job import Job
from raylora.local import cache_here
from raylora.training.loop import run_training
from raylora.training.reduce import Alone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def trained(job: Job) -> tuple[torch.Tensor, int]:
    """The adapter's numbers at the end, and how many recordings there were."""
    checked = check_job(job)
    run = make_run(
        job,
        checked.family,
        cache_here(checked),
        open_store(job),
        Alone(),
        torch.device("cuda"),
        prove=False,
    )
    try:
        run_training(run)
        return run.parts.adapter.values.detach().cpu().clone(), run.parts.graphs.count
    finally:
        run.close()


@pytest.mark.parametrize("base", ["full", "int8"])
@pytest.mark.parametrize("streaming", [0, 1])
@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_a_recorded_run_ends_where_the_plain_one_does(
    base: str, streaming: float, checkpointing: str, tmp_path: Path
) -> None:
    held_out = "jobs/quickstart/demo-data/holdout"
    common: dict[str, Any] = {
        "fleet__cpus_only": False,
        "training__steps": 12,
        "training__precision": "bf16",
        "memory__base": base,
        "memory__max_micro_batch": 4,
        "memory__offload_inputs": False,
        # Measured between steps, kernel by kernel: both ways must find each other's weights.
        "validation__folder": str(Path(__file__).parents[2] / held_out),
        "validation__every_steps": 3,
        "data__cache": str(tmp_path / "cache"),
    }
    plain = small_job(
        str(tmp_path / "plain"),
        **common,
        memory__cuda_graphs=False,
        memory__streaming=0,
        memory__checkpointing="none",
    )
    recorded = small_job(
        str(tmp_path / "recorded"),
        **common,
        memory__cuda_graphs=True,
        memory__streaming=streaming,
        memory__checkpointing=checkpointing,
    )
    wanted, none = trained(plain)
    found, some = trained(recorded)
    assert none == 0
    assert some > 0
    # The same kernels in the same order; a library may choose another for a recording.
    assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux1"])
def test_every_family_is_recorded_alike_also_where_autograd_adds_gradients_up(
    kind: str, rounded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rounded:  # as an adapter of many numbers: each layer casts its own
        monkeypatch.setattr(attach, "_ROUNDED_NUMBERS", 0)
    common: dict[str, Any] = {
        "family": {"kind": kind, "weights": str(random_folder(kind))},
        "fleet__cpus_only": False,
        "training__steps": 8,
        "training__precision": "bf16",
        "memory__max_micro_batch": 4,
        "memory__streaming": 0,
        "memory__checkpointing": "none",
        "data__cache": str(tmp_path / "cache"),
    }
    plain = small_job(str(tmp_path / "plain"), **common, memory__cuda_graphs=False)
    recorded = small_job(str(tmp_path / "recorded"), **common, memory__cuda_graphs=True)
    wanted, none = trained(plain)
    found, some = trained(recorded)
    assert (none, some > 0) == (0, True)
    assert found.isfinite().all()
    assert_close(found, wanted, rtol=1e-3, atol=1e-5)
