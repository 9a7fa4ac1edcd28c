"""The first file that a run saves moves the whole model as the adapter in training does."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from small import MakeJob, open_run

from raylora.adapt.from_file import adapter_on
from raylora.adapt.onto import names_of
from raylora.base.errors import ExportError
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
        assert found.effect > 0.01
        assert found.difference <= found.limit < 0.1 * found.effect
        assert (found.difference < 1e-6) == (dtype == "float32")
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
