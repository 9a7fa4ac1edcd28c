"""Previews: pictures divided over workers, each drawn once; training does not notice them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import MakeJob, final_state, open_run, train_small

from raylora.base.segments import read_segments
from raylora.job import with_overrides
from raylora.training.loop import Run, run_training
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


def test_recordings_leave_before_previews_are_drawn(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
):
    run = open_run(make_job(preview__prompts=PROMPTS[:1], training__steps=1))
    assert run.previews
    order: list[str] = []
    monkeypatch.setattr(run.parts.graphs, "drop", lambda: order.append("drop"))
    monkeypatch.setattr(run.previews, "draw", lambda parts, step: order.append("draw") or 0)
    run_training(run)
    run.close()
    assert order == ["drop", "draw"] * 2


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


def stored(run: Run, step: int, number: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(run.storage.read(sample_key(step, number)))))


def test_each_strength_is_a_picture_of_its_own_and_the_adapter_is_left_as_it_was(
    make_job: MakeJob,
):
    class Notes(Renders):
        def render(self, prompt: str, *, latents: Any, **_: Any) -> np.ndarray:
            strengths.append(run.parts.adapter.strength)
            return super().render(prompt, latents=latents)

    strengths: list[float] = []
    job = make_job(preview__prompts=[PROMPTS[0], f"{PROMPTS[1]} --am -1"])
    run = open_run(with_overrides(job, {"preview.strengths": [0.5, 1.5]}))
    assert run.previews
    run.previews._renderer = renders = Notes()
    run.parts.adapter.strength = 0.75
    run.previews.draw(run.parts, 5)
    assert run.parts.adapter.strength == 0.75
    assert strengths == [0.5, 1.5, -1.0]
    assert renders.asked == [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    assert [entry.key for entry in run.storage.entries("samples")] == [
        sample_key(5, number) for number in range(3)
    ]
    run.close()


DRAWN = {
    "preview__prompts": PROMPTS[:2],
    "preview__sampler": "euler_a",
    "preview__steps": 2,
    "preview__strengths": [0.5, 1],
    "preview__every_steps": 1,
}


@pytest.mark.slow
def test_a_sampler_that_draws_gives_the_same_picture_on_any_worker_and_in_any_round(
    make_job: MakeJob,
):
    pictures = {}
    for group, step in ((Alone(), 1), (Alone(), 2), (Third(), 3)):
        run = open_run(make_job(**DRAWN), group)
        assert run.previews
        run.parts.adapter.values.data.fill_(0.01)
        run.previews.draw(run.parts, step)
        pictures[step] = {n: stored(run, step, n) for n in range(group.rank, 4, group.size)}
        run.close()
    assert sorted(pictures[3]) == [1, 3]
    for number, picture in pictures[1].items():
        assert np.array_equal(picture, pictures[2][number])
        assert np.array_equal(picture, pictures[3].get(number, picture))
    assert not np.array_equal(pictures[1][0], pictures[1][1]), "strengths draw the same picture"


@pytest.mark.slow
def test_training_is_bit_equal_with_previews_and_without(make_job: MakeJob):
    before = torch.get_rng_state()
    finals = []
    for words in ({}, DRAWN):
        job = make_job(name=f"run{len(finals)}", training__steps=2, **words)
        train_small(job)
        finals.append(final_state(job))
    assert finals[0].keys() == finals[1].keys()
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    assert torch.equal(before, torch.get_rng_state())
