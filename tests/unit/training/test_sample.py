"""Previews: prompts divided over workers, each drawn once."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import MakeJob, open_run

from raylora.base.segments import read_segments
from raylora.training.loop import run_training
from raylora.training.reduce import Alone
from raylora.training.sample import sample_key

PROMPTS = ["ink icon, red heart, symbol", "ink icon, dog face, animal", "a cat"]


class Renders:
    """In a renderer's place: remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def render(self, prompt: str, *, latents: Any, **_: Any) -> np.ndarray:
        self.asked.append(prompt)
        return np.full((16, 16, 3), len(prompt), np.uint8)


class Third(Alone):
    rank, size = 1, 2


def test_prompts_are_divided_and_what_is_stored_is_not_drawn_again(make_job: MakeJob):
    job = make_job(preview__prompts=PROMPTS)
    asked = {}
    for group in (Alone(), Third()):
        run = open_run(job, group)
        assert run.previews
        run.previews._renderer = renders = Renders()
        if group.size == 1:
            run.previews.draw(run.parts, 5)
            run.previews.draw(run.parts, 5)
        else:
            run.previews.draw(run.parts, 6)
        asked[group.size] = renders.asked
        run.close()
    assert asked == {1: PROMPTS, 2: [PROMPTS[1]]}
    assert [entry.key for entry in run.storage.entries("samples")] == [
        *(sample_key(5, number) for number in range(3)),
        sample_key(6, 1),
    ]


def test_a_preview_that_does_not_fit_is_left_out_and_the_next_is_drawn(
    make_job: MakeJob,
):
    class Large(Renders):
        def render(self, prompt: str, *, latents: Any, **_: Any) -> np.ndarray:
            if prompt == PROMPTS[1]:
                raise torch.OutOfMemoryError("the card is full")
            return super().render(prompt, latents=latents)

    run = open_run(make_job(preview__prompts=PROMPTS, training__steps=1), report=True)
    assert run.previews
    run.previews._renderer = Large()
    run_training(run)
    run.close()
    drawn = [entry.key for entry in run.storage.entries("samples")]
    assert drawn == [sample_key(step, number) for step in (0, 1) for number in (0, 2)]
    told = [row for row in read_segments(run.storage, "events") if "out_of_memory" in row]
    assert [(row["event"], row["step"], row["out_of_memory"]) for row in told] == [
        ("previews left out", 0, 1),
        ("previews left out", 1, 1),
    ]


@pytest.mark.slow
def test_the_adapter_shows_in_the_picture_and_the_noise_does_not_change(make_job: MakeJob):
    run = open_run(make_job(preview__prompts=PROMPTS[:1], preview__steps=2))
    assert run.previews
    run.previews.draw(run.parts, 0)
    run.previews.draw(run.parts, 1)
    run.parts.adapter.values.data.normal_()
    run.previews.draw(run.parts, 2)
    pictures = [
        np.asarray(Image.open(io.BytesIO(run.storage.read(sample_key(step, 0)))))
        for step in (0, 1, 2)
    ]
    assert pictures[0].shape == (64, 64, 3)
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    run.close()
