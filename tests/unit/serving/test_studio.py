"""What the endpoint draws is what training drew, bit by bit, whatever the previews ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import ROOT, small_job, train_small

from raylora.assemble import open_store
from raylora.base.storage import open_storage
from raylora.gallery import Gallery, choose
from raylora.serving.library import Library
from raylora.serving.options import RenderRequest, ServeOptions
from raylora.training.sample import sample_key

PROMPTS = [
    "ink icon, red heart, symbol",
    {"prompt": "ink icon, dog face, animal", "sampler": "euler_a", "seed": 3, "width": 80},
]
RUNS: dict[str, dict[str, Any]] = {
    "denoiser": {},
    "both models": {"network__train": "both"},
    "pure noise": {"noise__zero_terminal_snr": True},
    "convolutions": {"network__kind": "locon"},
}


@pytest.mark.slow
@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_the_endpoint_draws_trainings_previews(tmp_path, words: dict[str, Any]):
    job = small_job(
        str(tmp_path),
        name="small",
        data__folder=str(ROOT / "jobs/quickstart/demo-data/holdout"),
        training__steps=2,
        optimizer__learning_rate=1e-2,
        schedule__warmup_steps=0,
        preview__prompts=PROMPTS,
        preview__strengths=[0.5, 1],
        preview__steps=3,
        **words,
    )
    train_small(job)
    run = open_store(job)
    library, options = Library(open_storage(str(tmp_path))), ServeOptions(base="small")
    gallery = Gallery(open_storage(str(tmp_path)), options, torch.device("cpu"))
    drawn = {}
    for number, picture in enumerate(job.preview.pictures()):
        for adapter in (None, "small/2"):
            request = RenderRequest(
                prompt=picture.prompt,
                adapter=adapter,
                strength=picture.strength,
                seed=picture.seed,
                stream=picture.stream,
                sampler=picture.sampler,
                width=picture.width,
            )
            png = gallery.draw(request, *choose(library, options, request)).png
            step = 0 if adapter is None else 2
            assert png == run.read(sample_key(step, number)), (number, adapter)
            drawn[step, number] = png
    # Step 0 has one picture a prompt: there is nothing yet to be strong.
    assert len(set(drawn.values())) == 6
