"""The held-out loss: one number for any fleet, micro-batch and seed of the job."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from children import together
from small import MakeJob, open_run
from torch import Tensor

from raylora.base.seeds import draw_normal, sample_number
from raylora.job import Job
from raylora.training.reduce import Distributed
from raylora.training.step import train_step

TIMESTEPS = (150, 700)


def held_out(make_job: MakeJob, **more: Any) -> Job:
    folder = make_job().data.folder
    return make_job(
        validation__folder=folder,
        validation__timesteps=TIMESTEPS,
        optimizer__learning_rate=1e-2,
        schedule__warmup_steps=0,
        **more,
    )


def measure_as(rank: int, job: Job) -> dict[str, float]:
    torch.set_num_threads(1)
    run = open_run(job, Distributed())
    assert run.validation
    try:
        return run.validation.measure(run.parts)
    finally:
        run.close()


def measure(job: Job, micro_batch: int = 8, steps: int = 0) -> dict[str, float]:
    run = open_run(job)
    assert run.validation
    run.parts.micro_batch = micro_batch
    for step in range(steps):
        train_step(run.parts, step)
    numbers = run.validation.measure(run.parts)
    run.close()
    return numbers


@pytest.mark.slow
def test_it_is_the_mean_over_images_and_timesteps_of_the_plain_loss(make_job: MakeJob):
    job = held_out(make_job)
    run = open_run(job)
    assert run.validation
    parts, dataset = run.parts, run.validation.dataset
    by_hand: dict[int, list[float]] = {timestep: [] for timestep in TIMESTEPS}
    for row, held in zip(dataset.rows, dataset.fetch(dataset.rows), strict=True):
        latents, text = (torch.from_numpy(held[word].copy())[None] for word in ("latents", "text"))
        for timestep, losses in by_hand.items():
            number = sample_number(row.key, 0)
            noise = draw_normal(
                latents[0].shape, seed=0, step=timestep, sample=number, purpose="validation"
            )
            left = float(parts.process.alphas_cumprod[timestep])
            drawn = torch.from_numpy(noise)
            noisy = left**0.5 * latents + (1 - left) ** 0.5 * drawn
            with torch.no_grad():
                prediction = parts.denoiser(noisy, torch.tensor([timestep]), text).sample
            velocity = left**0.5 * drawn - (1 - left) ** 0.5 * latents
            losses.append(float((prediction - velocity).square().mean()))
    numbers = run.validation.measure(parts)
    run.close()
    for timestep, losses in by_hand.items():
        assert numbers[f"validation/{timestep}"] == pytest.approx(
            sum(losses) / len(losses), rel=1e-5
        )
    whole = sum(numbers[f"validation/{timestep}"] for timestep in TIMESTEPS) / 2
    assert numbers["validation"] == pytest.approx(whole, rel=1e-12)


@pytest.mark.slow
def test_two_workers_measure_what_one_does(make_job: MakeJob):
    job = held_out(make_job, training__precision="fp64")
    first, second = together(2, measure_as, job)
    assert first == second
    assert first == pytest.approx(measure(job), rel=1e-12)


@pytest.mark.slow
def test_micro_batch_and_the_jobs_seed_do_not_matter(make_job: MakeJob):
    whole = measure(held_out(make_job))
    assert measure(held_out(make_job), micro_batch=3) == pytest.approx(whole, rel=1e-5)
    assert measure(held_out(make_job, training__seed=99)) == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
def test_what_was_learned_shows(make_job: MakeJob):
    job = held_out(make_job)
    assert measure(job, steps=6) != pytest.approx(measure(job), rel=1e-3)


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch(make_job: MakeJob, one_icon: str):
    job = make_job(validation__folder=one_icon, validation__timesteps=TIMESTEPS)
    run = open_run(job)
    assert run.validation
    whole = run.validation.measure(run.parts)
    run.validation.dataset = run.parts.loader.dataset  # 24 images
    predict = run.parts.predict

    def limited(denoiser: Any, noisy: Tensor, *more: Any) -> Tensor:
        if len(noisy) > 3:
            raise torch.OutOfMemoryError
        return predict(denoiser, noisy, *more)

    expected = run.validation.measure(run.parts)
    run.parts.predict = limited
    assert run.validation.measure(run.parts) == pytest.approx(expected, rel=1e-5)
    assert run.parts.micro_batch == 2
    assert whole["validation"] != expected["validation"]
    run.close()


def test_measuring_keeps_no_graph_and_touches_no_gradient(make_job: MakeJob, one_icon: str):
    run = open_run(make_job(validation__folder=one_icon, validation__timesteps=TIMESTEPS))
    train_step(run.parts, 0)
    gradients = run.parts.adapter.gradients.clone()
    values = run.parts.adapter.values.detach().clone()
    assert run.validation
    numbers = run.validation.measure(run.parts)
    assert all(isinstance(number, float) for number in numbers.values())
    assert torch.equal(run.parts.adapter.gradients, gradients)
    assert torch.equal(run.parts.adapter.values, values)
    run.close()
