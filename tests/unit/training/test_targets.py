"""What is shown and what is predicted: noise options, and what regularisation images keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import ROOT, MakeJob, open_run
from torch import Tensor
from torch.testing import assert_close

from raylora.diffusion.noise import draw_noise
from raylora.diffusion.schedules import rescaled_zero_terminal
from raylora.diffusion.timesteps import draw_timesteps
from raylora.training.loop import Run
from raylora.training.step import sample_losses

HOLDOUT = str(ROOT / "jobs/quickstart/demo-data/holdout")


def first_batch(run: Run) -> tuple[dict[str, Tensor], list[int]]:
    samples, tensors, _ = run.parts.loader.take(0)
    batch = {word: torch.from_numpy(held.copy())[None] for word, held in tensors[0].items()}
    return batch, [samples[0].number]


def watched(run: Run) -> dict[str, Tensor]:
    """The last noisy latents and target that went through."""
    seen: dict[str, Tensor] = {}
    predict, loss = run.parts.predict, run.parts.loss

    def look(denoiser: Any, noisy: Tensor, *more: Any) -> Tensor:
        seen["noisy"] = noisy
        return predict(denoiser, noisy, *more)

    def compare(prediction: Tensor, target: Tensor, *more: Any) -> Tensor:
        seen["target"] = target
        return loss(prediction, target, *more)

    run.parts.predict, run.parts.loss = look, compare
    return seen


@pytest.mark.parametrize(
    "noise",
    [
        {},
        {"offset": 0.5},
        {"multires_iterations": 4},
        {"input_perturbation": 0.3},
        {"zero_terminal_snr": True},
        {"prediction": "epsilon"},
    ],
    ids=str,
)
def test_the_step_shows_and_asks_for_what_the_noise_section_says(
    make_job: MakeJob, noise: dict[str, Any]
):
    run = open_run(make_job(noise=noise, training__precision="fp64"))
    parts = run.parts
    batch, numbers = first_batch(run)
    seen = watched(run)
    sample_losses(parts, batch, numbers, 5)
    plain = draw_noise(
        tuple(batch["latents"].shape[1:]), seed=parts.seed, step=5, samples=numbers
    ).double()
    drawn, shown = parts.noise.draw(batch["latents"], seed=parts.seed, step=5, samples=numbers)
    timesteps = draw_timesteps(low=0, high=1000, seed=parts.seed, step=5, samples=numbers)
    shares = shares_of(noise)
    signal, rest = shares[timesteps].sqrt(), (1 - shares[timesteps]).sqrt()
    latents, drawn = batch["latents"].double(), drawn.double()
    with_noise = drawn if shown is None else shown.double()
    assert_close(seen["noisy"], signal * latents + rest * with_noise, rtol=0, atol=1e-12)
    epsilon = noise.get("prediction") == "epsilon"
    target = drawn if epsilon else signal * drawn - rest * latents
    assert_close(seen["target"], target, rtol=0, atol=1e-12)
    changed = {"offset", "multires_iterations"} & noise.keys()
    assert torch.equal(drawn, plain) != bool(changed)
    assert (shown is not None) == ("input_perturbation" in noise)
    run.close()


@pytest.mark.parametrize(
    "noise", [{}, {"prediction": "epsilon"}, {"zero_terminal_snr": True}], ids=str
)
def test_the_loss_is_weighed_as_what_is_trained_and_not_as_the_base_was(
    make_job: MakeJob, noise: dict[str, Any]
):
    run = open_run(make_job(noise=noise, loss={"weight": {"name": "min_snr", "gamma": 5.0}}))
    timesteps = torch.tensor([10, 500, 998])
    prediction = torch.ones(3, 4, 2, 2, dtype=torch.float64)
    found = run.parts.loss(prediction, torch.zeros_like(prediction), timesteps, {})
    run.close()
    shares = shares_of(noise)[timesteps]
    snr = shares / (1 - shares)
    below = snr if noise.get("prediction") == "epsilon" else snr + 1
    assert_close(found.double(), snr.clamp(max=5) / below, rtol=1e-5, atol=0)


def shares_of(noise: dict[str, Any]) -> Tensor:
    """Shares of signal of the tiny base, written from its config."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    shares = (1 - betas).cumprod(0)
    return rescaled_zero_terminal(shares) if noise.get("zero_terminal_snr") else shares


@pytest.fixture
def sets(one_icon: str) -> list[dict[str, Any]]:
    return [
        {"folder": HOLDOUT},
        {"folder": one_icon, "is_reg": True, "output_preservation": True},
    ]


def of_sets(run: Run) -> dict[bool, tuple[dict[str, Tensor], list[int]]]:
    """A batch of one plain sample and of one that is preserved."""
    found: dict[bool, tuple[dict[str, Tensor], list[int]]] = {}
    for step in range(30):
        samples, tensors, _ = run.parts.loader.take(step)
        for sample, held in zip(samples, tensors, strict=True):
            batch = {word: torch.from_numpy(one.copy())[None] for word, one in held.items()}
            found.setdefault(bool(held["preserve"]), (batch, [sample.number]))
        if len(found) == 2:
            return found
    raise AssertionError("no step shows both")


@pytest.mark.slow
@pytest.mark.parametrize("train", ["denoiser", "both"])
def test_preserved_images_pull_to_what_the_base_predicts(
    make_job: MakeJob, sets: list[dict[str, Any]], train: str
):
    run = open_run(
        make_job(
            data__folder=None, data__sets=sets, network__train=train, training__precision="fp64"
        )
    )
    parts = run.parts
    batches = of_sets(run)
    with torch.no_grad():
        fresh = {kept: float(sample_losses(parts, *given, 0)) for kept, given in batches.items()}
        assert fresh[True] == 0, "a fresh adapter predicts as the base does"
        assert fresh[False] > 0
        parts.adapter.values += 0.05 * torch.sin(torch.arange(len(parts.adapter.values)))
        assert float(sample_losses(parts, *batches[True], 0)) > 0
    seen = watched(run)
    batch, numbers = batches[True]
    sample_losses(parts, batch, numbers, 0)
    noisy, target = seen["noisy"], seen["target"]
    timesteps = draw_timesteps(low=0, high=1000, seed=parts.seed, step=0, samples=numbers)
    with torch.no_grad(), parts.adapter.off():
        captions = {w: t for w, t in batch.items() if w in ("text", "ids", "weights")}
        base = parts.predict(parts.denoiser, noisy, timesteps, parts.read_text(captions))
    assert_close(target, base, rtol=0, atol=1e-13)
    assert parts.adapter.strength == 1.0
    run.close()


@pytest.mark.slow
def test_in_a_mixed_batch_each_sample_has_its_own_target(
    make_job: MakeJob, sets: list[dict[str, Any]]
):
    run = open_run(make_job(data__folder=None, data__sets=sets, training__precision="fp64"))
    parts = run.parts
    with torch.no_grad():
        parts.adapter.values += 0.05 * torch.sin(torch.arange(len(parts.adapter.values)))
    batches = of_sets(run)
    alone = torch.cat([sample_losses(parts, *batches[kept], 2) for kept in (False, True)])
    (plain, first), (kept, second) = batches[False], batches[True]
    together = {word: torch.cat([plain[word], kept[word]]) for word in plain}
    found = sample_losses(parts, together, [*first, *second], 2)
    assert_close(found, alone, rtol=1e-10, atol=1e-12)
    run.close()
