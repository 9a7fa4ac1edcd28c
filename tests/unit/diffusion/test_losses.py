"""Losses and weights: closed forms in float64, sd-scripts, and independence of batch mates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from raylora.diffusion.losses import LossOptions, WeightOptions, l1, l2, make_loss, min_snr_weight
from raylora.diffusion.process import Process
from raylora.diffusion.schedules import alphas_cumprod

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "losses.json").read_text()
)
SNR = torch.tensor([1000.0, 5.0, 4.0, 0.1, 1e-4], dtype=torch.float64)


def pair() -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(3)
    shape = (5, 4, 3, 2)
    return torch.from_numpy(random.normal(size=shape)), torch.from_numpy(random.normal(size=shape))


def test_errors_are_means_over_one_sample():
    prediction, target = pair()
    error = (prediction - target).numpy()
    assert l2(prediction, target).tolist() == pytest.approx([float(np.mean(e**2)) for e in error])
    assert l1(prediction, target).tolist() == pytest.approx([float(np.mean(abs(e))) for e in error])


@pytest.mark.parametrize("error", [l1, l2])
def test_a_16_bit_prediction_is_compared_in_the_targets_dtype(error: Any):
    prediction, target = (tensor.float() for tensor in pair())
    rounded = prediction.bfloat16()
    assert error(rounded, target).dtype == torch.float32
    assert torch.equal(error(rounded, target), error(rounded.float(), target))


@pytest.mark.parametrize("name", ["l1", "l2"])
@pytest.mark.parametrize("weight", ["none", "min_snr"])
def test_a_samples_loss_does_not_depend_on_its_mates(name: Any, weight: Any):
    loss = make_loss(LossOptions(name=name, weight=WeightOptions(name=weight)), sd15("epsilon"))
    prediction, target = pair()
    timesteps = torch.tensor([0, 1, 200, 500, 999])
    together = loss(prediction, target, timesteps)
    assert together.shape == (5,)
    for i in range(5):
        alone = loss(prediction[i : i + 1], target[i : i + 1], timesteps[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_min_snr_caps_the_pull_of_nearly_clean_samples():
    # Hang et al. 2023: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v.
    epsilon = min_snr_weight(SNR, gamma=5.0, prediction="epsilon")
    assert_close(epsilon, torch.tensor([0.005, 1, 1, 1, 1], dtype=torch.float64))
    v = min_snr_weight(SNR, gamma=5.0, prediction="v_prediction")
    expected = torch.tensor([5 / 1001, 5 / 6, 4 / 5, 0.1 / 1.1, 1e-4 / 1.0001])
    assert_close(v, expected.double(), rtol=1e-6, atol=0)


def sd15(prediction: Any) -> Process:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return Process(prediction, alphas_cumprod(betas))


@pytest.mark.parametrize("setting", list(GOLDEN["min_snr"]))
def test_min_snr_is_that_of_sd_scripts(setting: str):
    gamma, v_pred = setting.split(",")
    prediction = "v_prediction" if v_pred == "v_pred=True" else "epsilon"
    snr = sd15(prediction).snr(torch.tensor(GOLDEN["timesteps"]))
    weights = min_snr_weight(snr, gamma=float(gamma), prediction=prediction)
    # sd-scripts' fp32 table loses digits where little noise is left: 1 - alpha
    assert weights.tolist() == pytest.approx(GOLDEN["min_snr"][setting], rel=1e-4)


def test_l2_is_that_of_sd_scripts():
    prediction, target = torch.tensor(GOLDEN["pred"]), torch.tensor(GOLDEN["target"])
    assert l2(prediction, target).tolist() == pytest.approx(GOLDEN["l2"], rel=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_weighted_loss_is_error_times_weight(kind: Any):
    prediction, target = pair()
    timesteps = torch.tensor([0, 1, 200, 500, 999])
    options = LossOptions(name="l1", weight=WeightOptions(name="min_snr", gamma=2.0))
    found = make_loss(options, sd15(kind))(prediction, target, timesteps)
    share = sd15(kind).alphas_cumprod[timesteps]
    snr = share / (1 - share)
    weight = snr.clamp(max=2.0) / (snr if kind == "epsilon" else snr + 1)
    assert_close(found, (prediction - target).abs().mean((1, 2, 3)) * weight)


def test_a_gamma_of_zero_is_refused():
    with pytest.raises(ValidationError, match="greater than 0"):
        WeightOptions(name="min_snr", gamma=0.0)
