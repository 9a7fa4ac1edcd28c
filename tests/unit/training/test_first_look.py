"""The first file that a run saves moves the whole model as the adapter in training does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import random_folder
from small import ROOT, MakeJob, open_run

from raylora.adapt.from_file import adapter_on
from raylora.adapt.onto import names_of
from raylora.base.errors import ExportError
from raylora.job import load_job, with_overrides
from raylora.models import open_family
from raylora.training.first_look import FileAdapter, look_at
from raylora.training.loop import Run

CPU = torch.device("cpu")


def moved_run(make_job: MakeJob, **words: object) -> tuple[Run, FileAdapter]:
    """A run whose adapter was moved, and what reads its files back."""
    job = make_job(training__steps=1, **words)
    run = open_run(job, report=True)
    with torch.no_grad():
        run.parts.adapter.values += 0.2 * torch.sin(torch.arange(run.parts.adapter.values.numel()))
    sites, names = run.parts.adapter.sites, names_of(open_family(job))
    return run, partial(adapter_on, sites, names, dtype=torch.float32, device=CPU)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["denoiser", "both"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_honest_file_predicts_as_the_adapter_does(make_job: MakeJob, train: str, dtype: str):
    run, adapter_of = moved_run(make_job, network__train=train, export__dtype=dtype)
    try:
        assert run.saver
        file, before = run.saver.file(run.parts, 1), run.parts.adapter.values.clone()
        found = look_at(run.parts, file, adapter_of, file_dtype=getattr(torch, dtype))
        assert found
        assert found.effect > 0.01
        assert found.difference <= found.limit < 0.1 * found.effect
        assert (found.difference < 1e-6) == (dtype == "float32")
        assert found.limit < 1e-5 + 0.005 * found.effect
        assert torch.equal(run.parts.adapter.values, before)
        assert all(one.adapter is run.parts.adapter for one in run.parts.attachments)
    finally:
        run.close()


@pytest.mark.slow
def test_a_file_of_another_strength_is_refused_by_its_predictions(make_job: MakeJob):
    run, adapter_of = moved_run(make_job)
    try:
        assert run.saver
        file = run.saver.file(run.parts, 1)

        def weaker(data: bytes):
            adapter = adapter_of(data)
            adapter.scales = {name: 0.9 * scale for name, scale in adapter.scales.items()}
            return adapter

        with pytest.raises(ExportError, match="predicts otherwise than the adapter in training"):
            look_at(run.parts, file, weaker, file_dtype=torch.float32)
        assert all(one.adapter is run.parts.adapter for one in run.parts.attachments)
    finally:
        run.close()


@pytest.mark.slow
def test_what_rounding_explains_is_measured_on_the_base(make_job: MakeJob):
    """Each block rounds again, so that no number of roundings is right for every base."""
    run, adapter_of = moved_run(make_job, training__precision="bf16", memory__max_micro_batch=1)
    try:
        assert run.saver
        file = run.saver.file(run.parts, 1)
        found = look_at(run.parts, file, adapter_of, file_dtype=torch.float32)
        predict = run.parts.predict

        def rough(denoiser: Any, noisy: Any, *given: Any) -> Any:
            """A base in which what is one rounding apart ends far apart."""
            noise = torch.sin(1e4 * noisy.double()).to(noisy)
            return predict(denoiser, noisy, *given) + noise

        run.parts.predict = rough
        rougher = look_at(run.parts, file, adapter_of, file_dtype=torch.float32)
        assert rougher.limit > 10 * found.limit
    finally:
        run.close()


@pytest.mark.slow
def test_a_text_encoder_that_is_dropped_for_the_sample_is_looked_at(tmp_path: Path):
    job = with_overrides(
        load_job(ROOT / "jobs/smoke/sd3.yaml"),
        {
            "family.weights": str(random_folder("sd3")),
            "family.clip_l_dropout": 1.0,
            "family.clip_g_dropout": 1.0,
            "store": str(tmp_path),
            "network.train": "text_encoder",
            "training.steps": 1,
            "validation.folder": None,
            "preview.prompts": [],
            "export.naming": "kohya",
        },
    )
    run = open_run(job, report=True)
    try:
        assert run.saver
        with torch.no_grad():
            run.parts.adapter.values += 0.2
        names = names_of(open_family(job))
        adapter_of = partial(
            adapter_on, run.parts.adapter.sites, names, dtype=torch.float32, device=CPU
        )
        file = run.saver.file(run.parts, 1)
        assert look_at(run.parts, file, adapter_of, file_dtype=torch.float32).effect > 1e-3
    finally:
        run.close()


@pytest.mark.slow
def test_an_adapter_that_predicts_nothing_finite_is_no_fault_of_its_file(make_job: MakeJob):
    run, adapter_of = moved_run(make_job)
    try:
        assert run.saver
        file = run.saver.file(run.parts, 1)
        with torch.no_grad():
            run.parts.adapter.values.fill_(torch.inf)
        assert look_at(run.parts, file, adapter_of, file_dtype=torch.float32) is None
    finally:
        run.close()
