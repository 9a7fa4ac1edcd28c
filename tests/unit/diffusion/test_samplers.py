"""Samplers: each ends where the exact model points, with noise that is ours alone."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any, get_args

import diffusers
import numpy as np
import pytest
import torch
from small import ROOT
from torch.testing import assert_close

from raylora.diffusion.process import Flow, Process
from raylora.diffusion.samplers import (
    DrawNoise,
    Sampler,
    lms_coefficient,
    make_sampler,
    sampler_problems,
    starts_from_pure_noise,
)
from raylora.diffusion.schedules import alphas_cumprod, rescaled_zero_terminal

CONFIG = json.loads((ROOT / "jobs/quickstart/tiny-sd/scheduler/scheduler_config.json").read_text())
ALPHAS = alphas_cumprod(CONFIG)
NAMES: tuple[Sampler, ...] = get_args(Sampler)
DRAWING = ("euler_a", "dpm_2_a", "k_euler_a", "k_dpm_2_a")
FROM_PURE_NOISE = ("ddim", "euler", "euler_a", "k_euler", "k_euler_a", "dpmsolver", "dpmsolver++")
SHAPE = (1, 4, 8, 8)
# diffusers calls numpy on tensors in ways that numpy 2 would rather not have.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def drawn(seed: int, asked: list[int] | None = None) -> DrawNoise:
    def draw(number: int) -> torch.Tensor:
        if asked is not None:
            asked.append(number)
        numbers = np.random.default_rng([seed, number]).standard_normal(SHAPE)
        return torch.from_numpy(numbers.astype(np.float32))

    return draw


def sample(
    name: Sampler, process: Process, *, mean: float, spread: float, noise: DrawNoise, steps: int
) -> torch.Tensor:
    """Sampling with the exact model of data that are N(mean, spread^2), each number by itself."""
    scheduler = make_sampler(name, CONFIG, process=process, noise=noise)
    scheduler.set_timesteps(steps)
    latents = drawn(7)(0) * scheduler.init_noise_sigma
    table = process.alphas_cumprod
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, t)
        alpha = float(np.interp(float(t), np.arange(len(table)), table.numpy()))
        a, s = alpha**0.5, (1 - alpha) ** 0.5
        # The best guess of the clean latents of a Gaussian, and the noise that it leaves.
        clean = mean + a * spread**2 / (a**2 * spread**2 + s**2) * (given - a * mean)
        noise_left = (given - a * clean) / s
        told = noise_left if process.prediction == "epsilon" else a * noise_left - s * clean
        latents = scheduler.step(told, t, latents, return_dict=False)[0]
    found: torch.Tensor = latents
    return found


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NAMES)
def test_it_ends_in_the_only_picture_that_the_model_knows(name: Sampler, prediction: Any):
    process = Process(prediction, ALPHAS)
    found = sample(name, process, mean=0.7, spread=0.0, noise=drawn(1), steps=25)
    # These three end at the first timestep, as the base's config says: sigma 0.03, 3 deviations.
    early = name in ("ddim", "pndm", "dpmsolver")
    assert float((found - 0.7).abs().max()) < (0.1 if early else 1e-5)
    assert abs(float(found.mean()) - 0.7) < 0.015


@pytest.mark.parametrize("name", NAMES)
def test_the_spread_of_what_is_drawn_is_that_of_the_data(name: Sampler):
    found = sample(
        name, Process("v_prediction", ALPHAS), mean=0.0, spread=0.5, noise=drawn(1), steps=50
    )
    assert 0.4 < float(found.std()) < 0.6  # 256 numbers: 4 %; 50 steps: up to 10 %


@pytest.mark.parametrize("name", FROM_PURE_NOISE)
def test_a_model_of_pure_noise_is_sampled_from_its_last_timestep(name: Sampler):
    process = Process("v_prediction", rescaled_zero_terminal(ALPHAS))
    leading = {**CONFIG, "timestep_spacing": "leading"}
    scheduler = make_sampler(name, leading, process=process)
    scheduler.set_timesteps(20)
    assert float(scheduler.timesteps[0]) == 999
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    found = sample(name, process, mean=-1.5, spread=0.0, noise=drawn(1), steps=25)
    # The plain schedule never gets so dark: its start holds some of the picture's mean, 0.
    assert abs(float(found.mean()) + 1.5) < 0.02


def test_what_was_trained_goes_before_the_bases_config():
    usual = make_sampler("euler", CONFIG)
    assert usual.config.prediction_type == CONFIG["prediction_type"] == "v_prediction"
    other = make_sampler("euler", CONFIG, process=Process("epsilon", ALPHAS))
    assert other.config.prediction_type == "epsilon"
    assert not other.config.rescale_betas_zero_snr


@pytest.mark.parametrize("name", NAMES)
def test_only_ancestral_samplers_draw_and_their_noise_is_what_they_are_given(name: Sampler):
    asked: list[int] = []
    process = Process("v_prediction", ALPHAS)
    common = {"mean": 0.0, "spread": 0.5, "steps": 4}
    before = torch.get_rng_state()
    first = sample(name, process, noise=drawn(1, asked), **common)
    other = sample(name, process, noise=drawn(2), **common)
    assert torch.equal(first, sample(name, process, noise=drawn(1), **common))
    assert torch.equal(before, torch.get_rng_state()), "torch's own generator was used"
    assert asked == (list(range(1, len(asked) + 1)) if name in DRAWING else [])
    assert bool(asked) == (name in DRAWING)
    assert torch.equal(first, other) == (name not in DRAWING)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("k_")])
def test_a_k_before_the_name_changes_nothing(name: Sampler):
    process = Process("v_prediction", ALPHAS)
    plain: Any = name.removeprefix("k_")
    held = [
        sample(one, process, mean=0.2, spread=0.5, noise=drawn(1), steps=5) for one in (name, plain)
    ]
    assert torch.equal(*held)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_multistep_weights_are_the_integrals_of_lagrange_polynomials(order: int):
    sigmas = [14.6, 9.1, 5.5, 3.2, 1.7, 0.6, 0.0]
    step = 4
    points, weights = np.polynomial.legendre.leggauss(8)  # exact up to degree 15
    low, high = sigmas[step], sigmas[step + 1]
    at = (points + 1) / 2 * (high - low) + low
    for which in range(order):
        values = np.ones_like(at)
        for k in range(order):
            if k != which:
                values *= (at - sigmas[step - k]) / (sigmas[step - which] - sigmas[step - k])
        expected = float((weights * values).sum() * (high - low) / 2)
        found = lms_coefficient(sigmas, order, step, which)
        assert found == pytest.approx(expected, rel=1e-10)


def test_samplers_that_cannot_start_from_pure_noise_are_named_once_with_those_that_can():
    assert sampler_problems(NAMES, Process("v_prediction", ALPHAS)) == []
    rescaled = Process("v_prediction", rescaled_zero_terminal(ALPHAS))
    told = sampler_problems([*NAMES, "heun"], rescaled)
    assert {problem.partition(" ")[0] for problem in told} == set(NAMES) - set(FROM_PURE_NOISE)
    assert len(told) == len(NAMES) - len(FROM_PURE_NOISE)
    assert "Choose one of ddim, euler, euler_a," in told[0]


def test_a_schedule_without_any_signal_at_its_end_is_told_from_others():
    assert not starts_from_pure_noise(Process("v_prediction", ALPHAS))
    assert starts_from_pure_noise(Process("v_prediction", rescaled_zero_terminal(ALPHAS)))
    assert starts_from_pure_noise(Flow())


# -- flow models

SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLUX_DEV = {
    **SD3,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def sample_flow(name: Sampler, spread: float, steps: int, **words: Any) -> torch.Tensor:
    """Sampling with the exact slopes of data that are N(0.7, spread^2), each number by itself."""
    scheduler = make_sampler(name, words.pop("config", SD3), process=Flow())
    scheduler.set_timesteps(steps, **words)
    latents = drawn(7)(0)
    for t in scheduler.timesteps:
        sigma = float(t) / 1000
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        clean = 0.7 + (1 - sigma) * spread**2 / variance * (latents - (1 - sigma) * 0.7)
        slope = (latents - clean) / sigma
        latents = scheduler.step(slope, t, latents, return_dict=False)[0]
    found: torch.Tensor = latents
    return found


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_a_flow_ends_where_its_slopes_lead(name: Sampler):
    found = sample_flow(name, spread=0.0, steps=4)
    assert_close(found, torch.full(SHAPE, 0.7), rtol=0, atol=1e-5)
    # The flow keeps each number's place within the spread: noise n becomes 0.7 + spread n.
    exact, noise = sample_flow(name, spread=0.5, steps=200), drawn(7)(0)
    atol = {"euler": 0.05, "heun": 0.005}[name]  # of first and second order in 200 steps
    assert_close(exact, 0.7 + 0.5 * noise, rtol=0, atol=atol)


def test_heun_is_nearer_to_the_flow_than_euler_in_as_many_steps():
    exact = 0.7 + 0.5 * drawn(7)(0)
    euler, heun = (
        float((sample_flow(name, spread=0.5, steps=20) - exact).abs().max())
        for name in ("euler", "heun")
    )
    assert heun < euler / 3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SD3, {}),
        (FLUX_DEV, {"mu": 0.8, "sigmas": [1.0, 0.75, 0.5, 0.25]}),
        ({**FLUX_DEV, "use_dynamic_shifting": False, "shift": 1.0}, {"sigmas": [1.0, 0.5]}),
    ],
)
def test_heun_takes_eulers_sigmas_each_but_the_first_twice(
    config: dict[str, Any], words: dict[str, Any]
):
    steps = len(words["sigmas"]) if "sigmas" in words else 5
    given = words if "sigmas" in words else {"num_inference_steps": 5}
    plain = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    plain.set_timesteps(**given)
    euler, heun = (make_sampler(name, config, process=Flow()) for name in ("euler", "heun"))
    euler.set_timesteps(**given)
    heun.set_timesteps(**given)
    assert torch.equal(euler.sigmas, plain.sigmas)
    sigmas = plain.sigmas.tolist()
    twice = [sigmas[0], *(s for sigma in sigmas[1:-1] for s in (sigma, sigma)), 0.0]
    assert heun.sigmas.tolist() == twice
    assert len(heun.timesteps) == 2 * steps - 1
    assert_close(heun.timesteps, heun.sigmas[:-1] * 1000)
    if "mu" in words:
        k = math.exp(words["mu"])
        wanted = [k * s / (1 + (k - 1) * s) for s in words["sigmas"]]
        assert sigmas[:-1] == pytest.approx(wanted, rel=1e-6)


def test_pipelines_may_hand_their_sigmas_to_either_and_read_the_bases_shifts():
    for name in ("euler", "heun"):
        scheduler = make_sampler(name, FLUX_DEV, process=Flow())
        assert {"sigmas", "mu"} <= set(inspect.signature(scheduler.set_timesteps).parameters)
        assert scheduler.config.get("max_shift") == 1.15
        assert scheduler.config.get("use_dynamic_shifting")


def test_samplers_that_are_not_for_flow_models_are_named_with_those_that_are():
    assert sampler_problems(["euler", "heun"], Flow()) == []
    told = sampler_problems([*NAMES, "ddim"], Flow())
    assert len(told) == len(NAMES) - 2
    assert told[0] == "ddim is not for flow models. Choose euler or heun."
