"""Flow models: the straight path, its losses and weights in closed form, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from raylora.diffusion.losses import LossOptions, loss_problems, make_loss
from raylora.diffusion.noise import NoiseOptions, make_noise, noise_problems, trained_process
from raylora.diffusion.process import Flow, Prediction, Process
from raylora.diffusion.schedules import alphas_cumprod
from raylora.diffusion.weights import FLOW_WEIGHTS, flow_weight

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "flux_timesteps.json").read_text()
)["functions"]
TIMESTEPS = torch.tensor([0.0, 0.25, 333.3, 750.0, 1000.0])
SIGMAS = (TIMESTEPS.double() / 1000).tolist()
FLOW = Flow()


def normal(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((5, 4, 3, 2))).to(dtype)


def discrete(prediction: Prediction) -> Process:
    return Process(prediction, alphas_cumprod({"beta_start": 1e-4, "beta_end": 0.02}))


def options(**words: Any) -> LossOptions:
    return LossOptions.model_validate(words)


# -- the path


def test_noisy_latents_lie_on_the_line_and_its_slope_is_the_target():
    latents, noise = normal(1), normal(2)
    noisy, slope = (of(latents, noise, TIMESTEPS) for of in (FLOW.noisy, FLOW.target))
    for i, sigma in enumerate(SIGMAS):
        assert_close(noisy[i], (1 - sigma) * latents[i] + sigma * noise[i], rtol=1e-12, atol=1e-14)
        assert_close(noisy[i] - sigma * slope[i], latents[i], rtol=0, atol=1e-12)
        assert_close(noisy[i] + (1 - sigma) * slope[i], noise[i], rtol=0, atol=1e-12)
    assert torch.equal(noisy[0], latents[0])
    assert torch.equal(noisy[4], noise[4])


def test_whole_timesteps_of_any_kind_mean_the_same():
    latents, noise = normal(1), normal(2)
    whole = torch.tensor([0, 1, 150, 400, 999])
    assert torch.equal(FLOW.noisy(latents, noise, whole), FLOW.noisy(latents, noise, whole.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_latents_dtype_stays(dtype: torch.dtype):
    latents, noise = normal(1, dtype), normal(2, dtype)
    assert FLOW.noisy(latents, noise, TIMESTEPS).dtype == dtype
    assert FLOW.target(latents, noise, TIMESTEPS).dtype == dtype


def test_the_raw_prediction_of_sd_scripts_is_what_is_compared():
    # Their x_t - sigma * prediction is the picture that a right slope gives.
    held = GOLDEN["prediction"]
    inputs = GOLDEN["prediction_inputs"]
    slope, noisy = (torch.tensor(inputs[word]) for word in ("model_pred", "noisy"))
    sigmas = torch.tensor(inputs["sigmas"])
    assert torch.equal(torch.tensor(held["raw"]["out"]), slope)
    assert held["raw"]["weighting"] is None
    pictures = torch.tensor(held["sigma_scaled"]["out"])
    noise = pictures + slope
    assert_close(FLOW.noisy(pictures, noise, sigmas * 1000), noisy, rtol=1e-5, atol=1e-6)


# -- weights


def test_weights_are_those_of_sd_scripts_and_the_paper():
    t = torch.tensor(GOLDEN["t"], dtype=torch.float64)
    for name in ("sigma_sqrt", "cosmap"):
        theirs = torch.tensor(GOLDEN["loss_weighting"][name], dtype=torch.float64)
        assert_close(flow_weight(t, name), theirs, rtol=1e-6, atol=0)  # type: ignore[arg-type]
    cosmap = flow_weight(torch.linspace(0, 1, 100_001, dtype=torch.float64), "cosmap")
    assert float(cosmap.mean()) == pytest.approx(1, abs=1e-5), "a density"


def test_x0_makes_the_squared_error_of_the_slope_that_of_the_picture():
    latents, noise, wrong = normal(1), normal(2), normal(3)
    noisy = FLOW.noisy(latents, noise, TIMESTEPS)
    loss = make_loss(options(weight={"name": "x0"}), FLOW)
    found = loss(wrong, FLOW.target(latents, noise, TIMESTEPS), TIMESTEPS, {})
    pictures = noisy - torch.tensor(SIGMAS).view(-1, 1, 1, 1).double() * wrong
    assert_close(found, (pictures - latents).square().mean((1, 2, 3)), rtol=1e-6, atol=1e-12)


def test_no_sample_outweighs_a_run():
    clean = torch.tensor([0.0, 1e-9, 1e-3], dtype=torch.float64)
    assert_close(flow_weight(clean, "sigma_sqrt"), torch.full((3,), 1e6, dtype=torch.float64))


@pytest.mark.parametrize("name", ["l1", "l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("weight", ["none", *FLOW_WEIGHTS])
def test_a_samples_loss_is_its_own_weighed_error(name: Any, weight: Any):
    curve = {} if name in ("l1", "l2") else {"huber_c": 0.2}
    chosen = options(name=name, weight={"name": weight}, **curve)
    assert loss_problems(chosen, FLOW, "sd3") == []
    loss, prediction, target = make_loss(chosen, FLOW), normal(1), normal(2)
    together = loss(prediction, target, TIMESTEPS, {})
    d = (prediction - target).numpy()
    for i, sigma in enumerate(SIGMAS):
        c = 0.2**sigma
        root = 2 * (np.sqrt(d[i] ** 2 + c**2) - c)
        errors = {"l1": abs(d[i]), "l2": d[i] ** 2, "huber": c * root, "smooth_l1": root}[name]
        factor = {
            "none": 1.0,
            "sigma_sqrt": 1 / max(sigma, 1e-3) ** 2,
            "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
            "x0": sigma**2,
        }[weight]
        assert float(together[i]) == pytest.approx(factor * float(errors.mean()), rel=1e-6)
        one = slice(i, i + 1)
        alone = loss(prediction[one], target[one], TIMESTEPS[one], {})
        assert torch.equal(alone[0], together[i])


def test_hubers_threshold_is_constant_where_it_is_asked_to_be():
    chosen = options(name="huber", huber_schedule="constant", huber_c=0.2, huber_scale=3.0)
    found = make_loss(chosen, FLOW)(normal(1), normal(2), TIMESTEPS, {})
    d = (normal(1) - normal(2)).numpy()
    c = 0.6
    expected = 2 * c * (np.sqrt(d**2 + c**2) - c)
    assert found.tolist() == pytest.approx(expected.mean((1, 2, 3)).tolist())


def test_the_usual_schedule_of_huber_is_one_that_the_base_has():
    huber = options(name="huber")
    assert huber.schedule_for(FLOW) == "exponential"
    assert huber.schedule_for(discrete("epsilon")) == "snr"
    assert options(name="huber", huber_schedule="constant").schedule_for(FLOW) == "constant"


# -- what has no meaning


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            {"weight": {"name": "min_snr"}},
            "loss.weight.name is min_snr, which weighs by the signal",
        ),
        ({"weight": {"name": "debiased"}}, "loss.weight.name is debiased"),
        ({"name": "huber", "huber_schedule": "snr"}, "loss.huber_schedule is snr, a ratio"),
        ({"scale_v_pred_like_noise": True}, "loss.scale_v_pred_like_noise is true, which is for"),
        ({"v_pred_like": 0.5}, "loss.v_pred_like is 0.5, which is for models that predict epsilon"),
    ],
)
def test_losses_of_other_models_are_refused_by_the_familys_name(words: dict[str, Any], told: str):
    (problem,) = loss_problems(options(**words), FLOW, "flux1")
    assert problem.startswith(told)
    assert "flux1 is a flow model" in problem


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weight", FLOW_WEIGHTS)
def test_weights_of_flow_models_are_refused_elsewhere(weight: str, kind: Any):
    (problem,) = loss_problems(options(weight={"name": weight}), discrete(kind), "sdxl")
    assert problem.startswith(f"loss.weight.name is {weight}, a weight of flow models' sigmas")
    assert f"sdxl predicts {'v' if kind == 'v_prediction' else 'epsilon'}" in problem


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"offset": 0.1}, "noise.offset is 0.1, and sd3 is a flow model, whose last timestep"),
        ({"multires_iterations": 6}, "noise.multires_iterations is 6, and sd3 is a flow model"),
        ({"zero_terminal_snr": True}, "noise.zero_terminal_snr is true, and sd3 is a flow model"),
        ({"prediction": "epsilon"}, "noise.prediction is epsilon, and sd3 is a flow model, which"),
    ],
)
def test_noise_of_other_models_is_refused_by_the_familys_name(words: dict[str, Any], told: str):
    (problem,) = noise_problems(NoiseOptions.model_validate(words), FLOW, "sd3")
    assert problem.startswith(told)


def test_a_perturbed_input_has_a_meaning_and_the_process_stays():
    given = NoiseOptions(input_perturbation=0.1)
    assert noise_problems(given, FLOW, "sd3") == []
    assert trained_process(FLOW, given) is FLOW
    latents = normal(1, torch.float32)
    noise, shown = make_noise(given).draw(latents, seed=1, step=2, samples=[3, 4, 5, 6, 7])
    assert shown is not None
    moved = FLOW.noisy(latents, shown, TIMESTEPS) - FLOW.noisy(latents, noise, TIMESTEPS)
    assert float(moved[0].abs().max()) == 0, "none where there is no noise"
    assert float(moved[4].std()) == pytest.approx(0.1, rel=0.5)
