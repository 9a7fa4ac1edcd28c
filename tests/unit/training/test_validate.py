"""The held-out loss: one number for any fleet, micro-batch and seed of the job."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from children import together
from small import MakeJob, open_run
from torch import Tensor

from raylora.base.seeds import draw_normal, sample_number
from raylora.data.dataset import Dataset
from raylora.data.supply import Tensors, measured_tensors
from raylora.job import Job
from raylora.memory.setting import Setting
from raylora.training.loop import Run
from raylora.training.reduce import Distributed
from raylora.training.step import train_step
from raylora.training.validate import Validation, draw_measured

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
    run.parts.fitting.apply(Setting(micro_batch=micro_batch))
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


@pytest.mark.slow
def test_images_trained_on_are_measured_with_the_same_ruler(make_job: MakeJob, one_icon: str):
    run = open_run(make_job(validation__folder=one_icon, validation__timesteps=TIMESTEPS))
    assert run.validation
    trained_on = run.parts.loader.dataset
    both = Validation(run.validation.dataset, TIMESTEPS, training=trained_on, training_images=99)
    numbers = both.measure(run.parts)
    as_held_out = Validation(trained_on, TIMESTEPS).measure(run.parts)
    alone = run.validation.measure(run.parts)
    run.close()
    training = {k.replace("training", "validation"): v for k, v in numbers.items() if k[0] == "t"}
    assert training == as_held_out
    assert {k: v for k, v in numbers.items() if k[0] == "v"} == alone
    assert numbers["training"] != numbers["validation"]


def test_the_same_few_images_are_chosen_each_time_and_no_regularisation(make_job: MakeJob):
    folder = make_job().data.folder
    sets = [{"folder": folder}, {"folder": folder, "is_reg": True}]
    run = open_run(make_job(data__folder=None, data__sets=sets))
    dataset = run.parts.loader.dataset
    chosen = draw_measured(dataset, 5)
    run.close()
    assert len({row.key for row in chosen}) == 5
    assert {row.set for row in dataset.rows} == {0, 1}
    assert {row.set for row in chosen} == {0}
    assert draw_measured(dataset, 5) == chosen
    assert set(chosen) < set(draw_measured(dataset, 9)), "more of them are others"
    assert [row.key for row in chosen] != [row.key for row in dataset.rows][:5]
    assert len(draw_measured(dataset, 1000)) == 24


def test_what_gives_rows_their_tensors_can_be_handed_in(make_job: MakeJob, one_icon: str):
    run = open_run(make_job(validation__folder=one_icon))
    assert run.validation
    asked: list[str] = []

    def measured(dataset: Dataset, rows: Any) -> list[Tensors]:
        asked.extend(row.key for row in rows)
        return [{**one, "latents": one["latents"] * 0} for one in measured_tensors(dataset, rows)]

    plain = run.validation.measure(run.parts)
    handed = Validation(run.validation.dataset, TIMESTEPS, measured=measured).measure(run.parts)
    run.close()
    assert asked == ["alien.png"]
    assert handed["validation/150"] != plain["validation/150"]


@pytest.mark.slow
def test_two_workers_measure_both_rulers_as_one_does(make_job: MakeJob):
    job = held_out(make_job, training__precision="fp64")
    first, second = together(2, measure_both_as, job)
    assert first == second
    assert set(first) == {
        f"{a}{b}" for a in ("validation", "training") for b in ("", "/150", "/700")
    }
    run = open_run(job)
    assert first == pytest.approx(both_rulers(run), rel=1e-12)
    run.close()


def measure_both_as(rank: int, job: Job) -> dict[str, float]:
    torch.set_num_threads(1)
    run = open_run(job, Distributed())
    try:
        return both_rulers(run)
    finally:
        run.close()


def both_rulers(run: Run) -> dict[str, float]:
    assert run.validation
    trained_on = run.parts.loader.dataset
    both = Validation(run.validation.dataset, TIMESTEPS, training=trained_on, training_images=5)
    return both.measure(run.parts)
