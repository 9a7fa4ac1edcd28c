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

from raylora.diffusion.losses import (
    LossOptions,
    WeightOptions,
    l1,
    l2,
    make_loss,
    masked_mean,
    min_snr_weight,
    sample_mean,
)
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
    squared, absolute = sample_mean(l2(prediction, target)), sample_mean(l1(prediction, target))
    assert squared.tolist() == pytest.approx([float(np.mean(e**2)) for e in error])
    assert absolute.tolist() == pytest.approx([float(np.mean(abs(e))) for e in error])


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
    together = loss(prediction, target, timesteps, {})
    assert together.shape == (5,)
    for i in range(5):
        alone = loss(prediction[i : i + 1], target[i : i + 1], timesteps[i : i + 1], {})
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
    assert sample_mean(l2(prediction, target)).tolist() == pytest.approx(GOLDEN["l2"], rel=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_weighted_loss_is_error_times_weight(kind: Any):
    prediction, target = pair()
    timesteps = torch.tensor([0, 1, 200, 500, 999])
    options = LossOptions(name="l1", weight=WeightOptions(name="min_snr", gamma=2.0))
    found = make_loss(options, sd15(kind))(prediction, target, timesteps, {})
    share = sd15(kind).alphas_cumprod[timesteps]
    snr = share / (1 - share)
    weight = snr.clamp(max=2.0) / (snr if kind == "epsilon" else snr + 1)
    assert_close(found, (prediction - target).abs().mean((1, 2, 3)) * weight)


def test_a_plain_mask_is_that_of_sd_scripts():
    error, out = (torch.tensor(GOLDEN["masked"][name]) for name in ("loss", "out"))
    mask = torch.tensor(GOLDEN["masked"]["alpha_masks"]).reshape(2, 1, 8, 2, 8, 2).mean((3, 5))
    found = masked_mean(error, mask, by_area=False)
    assert_close(found, out.mean((1, 2, 3)), rtol=1e-5, atol=0)


def test_by_area_a_small_subject_weighs_as_much_as_a_large_one():
    error = torch.full((3, 4, 6, 6), 2.0, dtype=torch.float64)
    mask = torch.zeros((3, 1, 6, 6), dtype=torch.float64)
    mask[0, 0, :2, :2], mask[1] = 1.0, 1.0
    error[0, :, 3:] = 100.0  # outside of the mask
    assert masked_mean(error, mask, by_area=True).tolist() == [2.0, 2.0, 0.0]
    assert masked_mean(error, mask, by_area=False).tolist() == pytest.approx([2 / 9, 2.0, 0.0])


def test_a_grey_mask_counts_by_its_values():
    prediction, target = pair()
    mask = torch.rand((5, 1, 3, 2), generator=torch.Generator().manual_seed(2)).double()
    found = masked_mean(l2(prediction, target), mask, by_area=True)
    weights = mask.expand(5, 4, 3, 2).numpy()
    error = (prediction - target).numpy() ** 2
    expected = [float(np.average(e, weights=w)) for e, w in zip(error, weights, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("mask", "by_area"), [("area", True), ("plain", False)])
def test_masks_and_weights_of_a_batch_reach_its_loss(mask: Any, by_area: bool):
    prediction, target = pair()
    timesteps = torch.tensor([0, 1, 200, 500, 999])
    shape = torch.ones((5, 1, 3, 2), dtype=torch.float64)
    shape[:, :, 1:] = 0.25
    weighing = {"mask": shape, "weight": torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0]).double()}
    loss = make_loss(LossOptions(mask=mask), sd15("epsilon"), masked=True, weighed=True)
    expected = masked_mean(l2(prediction, target), shape, by_area=by_area) * weighing["weight"]
    assert_close(loss(prediction, target, timesteps, weighing), expected)
    plain = make_loss(LossOptions(mask=mask), sd15("epsilon"))
    assert_close(
        plain(prediction, target, timesteps, weighing), sample_mean(l2(prediction, target))
    )


def test_a_gamma_of_zero_is_refused():
    with pytest.raises(ValidationError, match="greater than 0"):
        WeightOptions(name="min_snr", gamma=0.0)
