"""Weights of timesteps: the papers' forms in float64, their limits, and sd-scripts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from raylora.diffusion.weights import (
    WeightOptions,
    debiased_weight,
    min_snr_weight,
    noise_like_weight,
    v_like_weight,
)

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "losses.json").read_text()
)
RATIOS = [1e9, 1000.0, 999.0, 5.0, 4.0, 1.0, 0.1, 1e-4]
SNR = torch.tensor(RATIOS, dtype=torch.float64)
KINDS: list[Any] = ["epsilon", "v_prediction"]


def sd_scripts_snr() -> Tensor:
    """Of the fp32 shares that sd-scripts has, in float64: 1 - share is exact there and here."""
    shares = torch.tensor(GOLDEN["alphas_cumprod_at"], dtype=torch.float64)
    return shares / (1 - shares)


def exactly(found: Tensor, expected: list[float]) -> None:
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_min_snr_caps_the_pull_of_nearly_clean_samples():
    # Hang et al. 2023: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v.
    for gamma in (0.5, 5.0):
        epsilon = min_snr_weight(SNR, gamma=gamma, prediction="epsilon")
        exactly(epsilon, [min(r, gamma) / r for r in RATIOS])
        v = min_snr_weight(SNR, gamma=gamma, prediction="v_prediction")
        exactly(v, [min(r, gamma) / (r + 1) for r in RATIOS])


def test_debiasing_lets_noisy_samples_count_more():
    # Yu et al. 2023: 1 / sqrt(SNR); sd-scripts stops at an SNR of 1000.
    epsilon = debiased_weight(SNR, prediction="epsilon")
    exactly(epsilon, [1 / math.sqrt(min(r, 1000)) for r in RATIOS])
    v = debiased_weight(SNR, prediction="v_prediction")
    exactly(v, [1 / (min(r, 1000) + 1) for r in RATIOS])


def test_the_losses_of_epsilon_and_v_differ_by_snr_over_snr_plus_one():
    shares = [min(r, 1000) / (min(r, 1000) + 1) for r in RATIOS]
    exactly(noise_like_weight(SNR), shares)
    exactly(v_like_weight(SNR, share=0.25), [1 + 0.25 / share for share in shares])


def test_without_signal_weights_take_their_limits():
    nothing = torch.zeros(1, dtype=torch.float64)
    for gamma in (1.0, 5.0):
        assert min_snr_weight(nothing, gamma=gamma, prediction="epsilon").item() == 1
        assert min_snr_weight(nothing, gamma=gamma, prediction="v_prediction").item() == 0
    assert debiased_weight(nothing, prediction="v_prediction").item() == 1
    assert noise_like_weight(nothing).item() == 0
    # these have none, which `loss_problems` refuses
    assert debiased_weight(nothing, prediction="epsilon").item() == math.inf
    assert v_like_weight(nothing, share=1.0).item() == math.inf


def test_without_noise_weights_take_their_limits():
    clean = torch.full((1,), math.inf, dtype=torch.float64)
    for kind in KINDS:
        assert min_snr_weight(clean, gamma=5.0, prediction=kind).item() == 0
    assert debiased_weight(clean, prediction="epsilon").item() == pytest.approx(1000**-0.5)
    assert debiased_weight(clean, prediction="v_prediction").item() == pytest.approx(1 / 1001)
    assert noise_like_weight(clean).item() == pytest.approx(1000 / 1001)


@pytest.mark.parametrize("setting", list(GOLDEN["weights"]))
def test_weights_are_those_of_sd_scripts(setting: str):
    name, _, value = setting.partition("=")
    number = value.partition(",")[0]
    kind: Any = "v_prediction" if setting.endswith("v_pred=True") else "epsilon"
    snr = sd_scripts_snr()
    if name == "min_snr_gamma":
        found = min_snr_weight(snr, gamma=float(number), prediction=kind)
    elif name == "debiased,v_pred":
        found = debiased_weight(snr, prediction=kind)
    elif name == "v_pred_like_loss":
        found = v_like_weight(snr, share=float(number))
    else:
        assert setting == "scale_v_pred_loss_like_noise_pred"
        found = noise_like_weight(snr)
    assert found.tolist() == pytest.approx(GOLDEN["weights"][setting], rel=1e-6)


def test_a_gamma_without_effect_or_of_zero_is_refused():
    with pytest.raises(ValidationError, match="greater than 0"):
        WeightOptions(name="min_snr", gamma=0.0)
    for name in ("none", "debiased"):
        with pytest.raises(
            ValidationError, match=r"loss\.weight\.gamma is 3, which only min_snr uses"
        ):
            WeightOptions(name=name, gamma=3.0)
    # a job's own record writes every default out
    assert WeightOptions.model_validate(WeightOptions().model_dump()) == WeightOptions()
