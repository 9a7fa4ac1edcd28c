"""Noising and targets against the papers' formulas in float64, diffusers, and sd-scripts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from raylora.diffusion.process import Prediction, Process
from raylora.diffusion.schedules import alphas_cumprod, rescaled_zero_terminal

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "losses.json").read_text()
)
TIMESTEPS = torch.tensor([0, 1, 250, 999])


def process(prediction: Prediction) -> Process:
    return Process(prediction, alphas_cumprod(SD15))


def normal(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = np.random.default_rng(seed).standard_normal((4, 3, 2, 5))
    return torch.from_numpy(values).to(dtype)


def signal_and_sigma() -> tuple[Tensor, Tensor]:
    """By products, not by the code's cumprod: Ho et al. 2020, betas linear in the square root."""
    left, shares = 1.0, []
    for i in range(1000):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999
        left *= 1.0 - root**2
        shares.append(left)
    held = torch.tensor(shares, dtype=torch.float64)[TIMESTEPS].view(-1, 1, 1, 1)
    return held.sqrt(), (1 - held).sqrt()


def test_noisy_latents_are_signal_plus_noise():
    latents, noise = normal(1), normal(2)
    signal, sigma = signal_and_sigma()
    for prediction in ("epsilon", "v_prediction"):
        noisy = process(prediction).noisy(latents, noise, TIMESTEPS)
        assert_close(noisy, signal * latents + sigma * noise, rtol=1e-12, atol=1e-12)


def test_targets_are_the_noise_or_the_velocity():
    latents, noise = normal(1), normal(2)
    signal, sigma = signal_and_sigma()
    assert torch.equal(process("epsilon").target(latents, noise, TIMESTEPS), noise)
    velocity = process("v_prediction").target(latents, noise, TIMESTEPS)
    assert_close(velocity, signal * noise - sigma * latents, rtol=1e-12, atol=1e-12)


def test_a_right_velocity_gives_latents_and_noise_back():
    latents, noise = normal(1), normal(2)
    signal, sigma = signal_and_sigma()
    v = process("v_prediction").target(latents, noise, TIMESTEPS)
    noisy = process("v_prediction").noisy(latents, noise, TIMESTEPS)
    assert_close(signal * noisy - sigma * v, latents, rtol=0, atol=1e-12)
    assert_close(sigma * noisy + signal * v, noise, rtol=0, atol=1e-12)


def test_snr_is_signal_over_noise_power():
    signal, sigma = signal_and_sigma()
    snr = process("epsilon").snr(TIMESTEPS)
    assert snr.dtype == torch.float64
    assert_close(snr, (signal**2 / sigma**2).flatten(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_latents_dtype_stays(dtype: torch.dtype):
    latents, noise = normal(1, dtype), normal(2, dtype)
    chosen = process("v_prediction")
    assert chosen.noisy(latents, noise, TIMESTEPS).dtype == dtype
    assert chosen.target(latents, noise, TIMESTEPS).dtype == dtype


def test_the_snr_of_every_timestep_is_that_of_each():
    chosen, every = process("epsilon"), torch.arange(1000)
    assert torch.equal(chosen.snr(every), chosen.snr_by_timestep)
    assert chosen.steps == len(chosen.snr_by_timestep) == 1000


def test_tables_are_reckoned_once_and_belong_to_their_process():
    chosen, latents, noise = process("v_prediction"), normal(1), normal(2)
    chosen.noisy(latents, noise, TIMESTEPS)
    kept = chosen._shares
    chosen.target(latents, noise, TIMESTEPS)
    assert chosen._shares is kept
    other = replace(chosen, alphas_cumprod=rescaled_zero_terminal(chosen.alphas_cumprod))
    last = torch.full((4,), 999)
    assert torch.equal(other.noisy(latents, noise, last), noise)
    assert torch.equal(other.target(latents, noise, last), -latents)
    assert torch.equal(other.snr(last), torch.zeros(4, dtype=torch.float64))
    assert not torch.equal(chosen.noisy(latents, noise, last), noise)


def test_sd_scripts_computes_the_same():
    latents, noise = (torch.tensor(GOLDEN["conversion"][word]) for word in ("latents", "noise"))
    timesteps = torch.tensor(GOLDEN["timesteps"])
    chosen = process("v_prediction")
    noisy, velocity = (torch.tensor(GOLDEN["conversion"][word]) for word in ("noisy", "velocity"))
    # fp32, and sd-scripts' table of alphas is fp32 too
    assert_close(chosen.noisy(latents, noise, timesteps), noisy, rtol=1e-5, atol=1e-6)
    assert_close(chosen.target(latents, noise, timesteps), velocity, rtol=1e-5, atol=1e-6)
    assert_close(chosen.snr(timesteps).float(), torch.tensor(GOLDEN["snr_at"]), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusers_computes_the_same(prediction: Prediction):
    from diffusers.schedulers import DDPMScheduler

    scheduler = DDPMScheduler.from_config({**SD15, "prediction_type": prediction})
    latents, noise = normal(1, torch.float32), normal(2, torch.float32)
    chosen = process(prediction)
    theirs = scheduler.add_noise(latents, noise, TIMESTEPS)
    assert_close(chosen.noisy(latents, noise, TIMESTEPS), theirs, rtol=1e-5, atol=1e-6)
    if prediction == "v_prediction":
        theirs = scheduler.get_velocity(latents, noise, TIMESTEPS)
        assert_close(chosen.target(latents, noise, TIMESTEPS), theirs, rtol=1e-5, atol=1e-6)
