"""One global step: the same for any micro-batch, replayed when memory runs out, clipped once."""

from __future__ import annotations

import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import ROOT, MakeJob, final_state, open_run
from torch import Tensor
from torch.testing import assert_close

from raylora.base.errors import MemoryPlanError
from raylora.job import Job
from raylora.training.loop import Run, run_training
from raylora.training.step import losses_at, sample_losses, train_step

HOLDOUT = ROOT / "jobs/quickstart/demo-data/holdout"


def limit_memory(run: Run, most_images: int, *, from_call: int = 0) -> list[int]:
    """Let the denoiser run out of memory above some images; batch sizes that were tried."""
    predict, tried = run.parts.predict, []

    def limited(denoiser: Any, noisy: Tensor, *more: Any) -> Tensor:
        tried.append(len(noisy))
        if len(noisy) > most_images and len(tried) > from_call:
            raise torch.OutOfMemoryError("a test's")
        return predict(denoiser, noisy, *more)

    run.parts.predict = limited
    return tried


def trained(job: Job, most_images: int | None = None, **more: int) -> dict[str, Tensor]:
    run = open_run(job, report=True)
    try:
        if most_images:
            limit_memory(run, most_images, **more)
        run_training(run)
    finally:
        run.close()
    return final_state(job)


@pytest.mark.slow
@pytest.mark.parametrize("from_call", [0, 2])
def test_out_of_memory_halves_the_micro_batch_and_replays_the_step(
    make_job: MakeJob, from_call: int
):
    given = {"training__images_per_step": 6, "training__steps": 4}
    short = trained(make_job(name="short", **given), 2, from_call=from_call)
    enough = trained(make_job(name="enough", memory__max_micro_batch=2, **given))
    for name, tensor in enough.items():
        if from_call == 0:
            assert torch.equal(short[name], tensor), name
        else:  # two steps went through in one batch before
            assert_close(short[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_micro_batch_stays_halved_and_one_image_too_many_is_an_error(make_job: MakeJob):
    run = open_run(make_job(training__images_per_step=8))
    tried = limit_memory(run, 2)
    train_step(run.parts, 0)
    broken = [size for size in tried if size > 2]
    assert len(broken) == 2
    assert 4 < broken[0] <= 8
    assert 2 < broken[1] <= 4
    assert run.parts.micro_batch == 2
    tried.clear()
    train_step(run.parts, 1)
    assert max(tried) == 2
    assert sum(tried) == 8
    limit_memory(run, 0)
    with pytest.raises(MemoryPlanError, match="with every strategy that the job allows on"):
        train_step(run.parts, 2)
    run.close()


@pytest.mark.slow
def test_nothing_of_a_broken_try_stays_in_the_gradient(make_job: MakeJob):
    results = []
    for breaks in (False, True):
        run = open_run(make_job(training__images_per_step=4, memory__max_micro_batch=2))
        if breaks:
            predict, calls = run.parts.predict, []

            def second_fails(*given: Any, predict: Any = predict, calls: Any = calls) -> Tensor:
                calls.append(1)
                if len(calls) == 2:
                    raise torch.OutOfMemoryError
                return predict(*given)  # type: ignore[no-any-return]

            run.parts.predict = second_fails
        else:
            run.parts.fitting.apply(run.parts.fitting.setting.but(micro_batch=1))
        results.append((train_step(run.parts, 0), run.parts.adapter.gradients.clone()))
        run.close()
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0].loss, results[1][0].loss)


@pytest.mark.slow
def test_a_backward_that_ran_out_of_memory_holds_none_when_the_step_begins_again(
    make_job: MakeJob,
):
    run = open_run(make_job(training__images_per_step=4))
    parts, held = run.parts, []
    predict = parts.predict

    class RunOut:
        def __call__(self, gradient: Tensor) -> None:
            raise torch.OutOfMemoryError("a test's")

    def first_fails(*given: Any) -> Tensor:
        found: Tensor = predict(*given)
        if held:
            assert held[0]() is None, "what the broken try computed is still there"
        else:
            hook = RunOut()
            found.register_hook(hook)  # which lives as long as what its backward needs
            held.append(weakref.ref(hook))
        return found

    parts.predict = first_fails
    train_step(parts, 0)
    assert len(held) == 1
    run.close()


@pytest.mark.slow
def test_a_step_is_the_same_for_any_micro_batch_in_fp64(make_job: MakeJob):
    found = []
    for size in (1, 2, 3, 8):
        job = make_job(
            training__precision="fp64", training__images_per_step=6, memory__max_micro_batch=size
        )
        run = open_run(job)
        losses = [float(train_step(run.parts, number).loss) for number in range(3)]
        found.append((torch.tensor(losses), run.parts.adapter.values.detach()))
        run.close()
    for losses, values in found[1:]:
        assert_close(losses, found[0][0], rtol=1e-12, atol=0)
        assert_close(values, found[0][1], rtol=0, atol=1e-11)  # fp64, through Adam's division


def test_losses_and_gradients_are_divided_by_the_images_of_the_whole_step(make_job: MakeJob):
    run = open_run(make_job(training__images_per_step=3, optimizer__max_grad_norm=0))
    parts = run.parts
    samples, tensors, count = parts.loader.take(0)
    losses = []
    for sample, held in zip(samples, tensors, strict=True):
        batch = {word: torch.from_numpy(array.copy())[None] for word, array in held.items()}
        losses.append(sample_losses(parts, batch, [sample.number], 0)[0])
    mean = torch.stack(losses).mean()
    parts.adapter.gradients.zero_()
    mean.backward()
    by_hand = parts.adapter.gradients.clone()
    result = train_step(parts, 0)
    assert count == result.images == result.my_images == 3
    assert_close(result.loss, mean.detach())
    assert_close(parts.adapter.gradients, by_hand, rtol=1e-4, atol=1e-7)
    assert_close(result.gradient_norm, by_hand.norm())
    run.close()


@pytest.mark.slow
def test_a_long_gradient_is_shortened_and_a_short_one_left(make_job: MakeJob):
    norms = {}
    for limit in (0.0, 1e-3, 1e6):
        run = open_run(make_job(optimizer__max_grad_norm=limit))
        result = train_step(run.parts, 0)
        norms[limit] = (float(result.gradient_norm), float(run.parts.adapter.gradients.norm()))
        run.close()
    told = {before for before, _ in norms.values()}
    assert len(told) == 1, "the norm that is told is the one before clipping"
    (before,) = told
    assert before > 1e-3
    assert norms[0.0][1] == norms[1e6][1] == pytest.approx(before)
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-2)


def test_the_rate_follows_the_schedule(make_job: MakeJob):
    run = open_run(
        make_job(
            training__steps=4,
            optimizer__learning_rate=0.01,
            schedule__name="linear",
            schedule__warmup_steps=2,
        )
    )
    rates = []
    for number in range(4):
        train_step(run.parts, number)
        rates.append(run.parts.mover.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005])
    run.close()


def test_timesteps_stay_in_the_jobs_range(make_job: MakeJob):
    run = open_run(make_job(training__min_timestep=300, training__max_timestep=310))
    predict, seen = run.parts.predict, []

    def look(denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        seen.extend(timesteps.tolist())
        return predict(denoiser, noisy, timesteps, conditions)

    run.parts.predict = look
    for number in range(4):
        train_step(run.parts, number)
    assert len(seen) == 16
    assert 300 <= min(seen) < max(seen) < 310
    run.close()


@pytest.mark.parametrize(
    ("precision", "activations", "exact"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_dtypes_are_explicit(
    make_job: MakeJob, precision: str, activations: torch.dtype, exact: torch.dtype
):
    run = open_run(make_job(training__precision=precision, training__images_per_step=1))
    predict, seen = run.parts.predict, []

    def look(denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        seen.extend([noisy.dtype, conditions["text"].dtype])
        return predict(denoiser, noisy, timesteps, conditions)

    run.parts.predict = look
    result = train_step(run.parts, 0)
    assert set(seen) == {activations}
    assert result.loss.dtype == exact
    assert run.parts.adapter.values.dtype == run.parts.adapter.gradients.dtype == exact
    assert torch.isfinite(run.parts.adapter.values).all()
    run.close()


def test_losses_at_given_noise_are_those_of_the_formula(make_job: MakeJob):
    run = open_run(make_job())
    parts = run.parts
    _, tensors, _ = parts.loader.take(0)
    batch = {word: torch.from_numpy(array.copy())[None] for word, array in tensors[0].items()}
    noise, timesteps = torch.full_like(batch["latents"], 0.5), torch.tensor([700])
    left = parts.process.alphas_cumprod[700].float()
    noisy = left.sqrt() * batch["latents"] + (1 - left).sqrt() * noise
    wanted = left.sqrt() * noise - (1 - left).sqrt() * batch["latents"]  # the tiny base predicts v
    with torch.no_grad():
        prediction = parts.denoiser(noisy, timesteps, batch["text"]).sample
        found = losses_at(parts, batch, noise, timesteps)
    assert_close(found, (prediction - wanted).square().mean((1, 2, 3)), rtol=1e-5, atol=1e-7)
    run.close()


@pytest.mark.slow
def test_the_average_takes_in_each_steps_values_as_the_cap_left_them(make_job: MakeJob):
    run = open_run(
        make_job(
            training__precision="fp64",
            training__images_per_step=1,
            schedule__warmup_steps=0,
            network__max_norm=0.01,
            ema__decay=0.2,
        )
    )
    parts = run.parts
    assert parts.ema is not None
    average = parts.adapter.values.detach().clone()
    for step in range(3):
        result = train_step(parts, step)
        assert int(result.extra["capped_layers"]) > 0
        kept = min(0.2, (2 + step) / (11 + step))
        average = kept * average + (1 - kept) * parts.adapter.values.detach()
        assert_close(parts.ema.average, average, rtol=0, atol=1e-15)
    run.close()


def test_what_is_left_out_is_that_of_the_step_and_of_each_sample_in_its_place(make_job: MakeJob):
    run = open_run(make_job(network__rank_dropout=0.2, memory__max_micro_batch=3))
    parts = run.parts
    assert parts.adapter.dropout is not None
    begin, asked = parts.adapter.dropout.begin, []

    def note(step: int, samples: Any) -> None:
        asked.append((step, list(samples)))
        begin(step, samples)

    parts.adapter.dropout.begin = note  # type: ignore[method-assign]
    drawn, noise = parts.noise.draw, []

    def draw(latents: Tensor, **words: Any) -> Any:
        noise.append((words["step"], list(words["samples"])))
        return drawn(latents, **words)

    parts.noise = SimpleNamespace(draw=draw)  # type: ignore[assignment]
    for step in (3, 4):
        train_step(parts, step)
    assert asked == noise
    assert {step for step, _ in asked} == {3, 4}
    samples = [sample.number for step in (3, 4) for sample in parts.loader.take(step)[0]]
    assert sorted(number for _, numbers in asked for number in numbers) == sorted(samples)
    run.close()


def test_measuring_builds_no_graph_through_a_text_encoder_in_training(make_job: MakeJob):
    run = open_run(make_job(network__train="both", training__images_per_step=1))
    parts = run.parts
    _, tensors, _ = parts.loader.take(0)
    batch = {word: torch.from_numpy(array.copy())[None] for word, array in tensors[0].items()}
    read, graph = parts.read_text, []

    def look(captions: Any) -> Any:
        found = read(captions)
        graph.extend(tensor.requires_grad for tensor in found.values())
        return found

    parts.read_text = look
    given = (parts, batch, torch.ones_like(batch["latents"]), torch.tensor([300]))
    with torch.no_grad():
        losses_at(*given)
    assert graph == [False]
    losses_at(*given)
    losses_at(*given, text_learns=False)
    assert graph == [False, True, False]
    run.close()


@pytest.fixture
def mixed(one_icon: str, tmp_path: Path) -> list[dict[str, Any]]:
    """Images with masks, others, and one that is preserved and counts half."""
    masked, masks = tmp_path / "masked", tmp_path / "masks"
    masked.mkdir()
    masks.mkdir()
    draw = np.random.default_rng(0)
    for name in ("cactus", "beer-mug"):
        for file in HOLDOUT.glob(f"{name}.*"):
            (masked / file.name).write_bytes(file.read_bytes())
        width, height = Image.open(masked / f"{name}.png").size
        mask = draw.integers(0, 256, (height, width), dtype=np.uint8)
        Image.fromarray(mask).save(masks / f"{name}.png")
    return [
        {"folder": str(HOLDOUT)},
        {"folder": str(masked), "mask_folder": str(masks), "repeats": 12},
        {"folder": one_icon, "is_reg": True, "output_preservation": True},
    ]


@pytest.mark.slow
def test_a_step_of_all_kinds_of_images_is_the_same_for_any_micro_batch_in_fp64(
    make_job: MakeJob, mixed: list[dict[str, Any]]
):
    found = []
    for size in (1, 8):
        job = make_job(
            data__folder=None,
            data__sets=mixed,
            data__prior_loss_weight=0.5,
            loss__weight__name="min_snr",
            network={"train": "both", "rank": 4, "dropout": 0.1, "rank_dropout": 0.1},
            noise={"offset": 0.1, "adaptive_scale": 0.1, "input_perturbation": 0.1},
            training__precision="fp64",
            training__images_per_step=6,
            memory__max_micro_batch=size,
        )
        run = open_run(job)
        _, tensors, _ = run.parts.loader.take(0)
        kinds = {(float(one["weight"]), bool(one["mask"].min() < 1)) for one in tensors}
        assert kinds == {(1.0, False), (1.0, True), (0.5, False)}
        losses = [float(train_step(run.parts, number).loss) for number in range(2)]
        found.append((torch.tensor(losses), run.parts.adapter.values.detach()))
        run.close()
    (losses, values), expected = found
    assert_close(losses, expected[0], rtol=1e-12, atol=0)
    assert_close(values, expected[1], rtol=0, atol=1e-11)  # fp64, through Adam's division


def test_waiting_for_tensors_and_computing_are_told_apart(make_job: MakeJob):
    run = open_run(make_job(training__images_per_step=1))
    take = run.parts.loader.take

    def slowly(step: int) -> Any:
        time.sleep(0.05)
        return take(step)

    run.parts.loader.take = slowly  # type: ignore[method-assign]
    began = time.perf_counter()
    result = train_step(run.parts, 0)
    whole = time.perf_counter() - began
    run.close()
    assert result.wait_seconds >= 0.05
    assert result.my_seconds > 0
    assert result.wait_seconds + result.my_seconds <= whole
