"""Losses: closed forms in float64, sd-scripts, and independence of batch mates."""

from __future__ import annotations

import json
import math
from itertools import product
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
    huber,
    huber_thresholds,
    l1,
    l2,
    loss_problems,
    make_loss,
    masked_mean,
    sample_mean,
    smooth_l1,
    timestep_weights,
)
from raylora.diffusion.process import Flow, Process
from raylora.diffusion.schedules import alphas_cumprod, rescaled_zero_terminal

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "losses.json").read_text()
)
TIMESTEPS = torch.tensor([0, 1, 200, 500, 999])


def pair() -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(3)
    shape = (5, 4, 3, 2)
    return torch.from_numpy(random.normal(size=shape)), torch.from_numpy(random.normal(size=shape))


def sd15(prediction: Any) -> Process:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return Process(prediction, alphas_cumprod(betas))


def zero_terminal(prediction: Any) -> Process:
    return Process(prediction, rescaled_zero_terminal(sd15(prediction).alphas_cumprod))


def sd_scripts(prediction: Any) -> Process:
    """With its own fp32 shares, which are off by 6e-8, so by 7e-5 in 1 - share where t is 0."""
    alphas = sd15(prediction).alphas_cumprod.clone()
    alphas[GOLDEN["timesteps"]] = torch.tensor(GOLDEN["alphas_cumprod_at"], dtype=torch.float64)
    return Process(prediction, alphas)


def options(**words: Any) -> LossOptions:
    return LossOptions.model_validate(words)


def problem_of(**words: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        options(**words)
    return caught.value.errors()[0]["msg"].removeprefix("Value error, ")


# -- errors


def test_errors_are_means_over_one_sample():
    prediction, target = pair()
    error = (prediction - target).numpy()
    squared, absolute = sample_mean(l2(prediction, target)), sample_mean(l1(prediction, target))
    assert squared.tolist() == pytest.approx([float(np.mean(e**2)) for e in error])
    assert absolute.tolist() == pytest.approx([float(np.mean(abs(e))) for e in error])


def test_huber_is_square_up_to_its_threshold_and_straight_beyond():
    prediction, target = pair()
    c = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    for i, threshold in enumerate(c.tolist()):
        d = (prediction[i] - target[i]).numpy()
        root = np.sqrt(d**2 + threshold**2) - threshold
        for found, factor in ((huber, 2 * threshold), (smooth_l1, 2.0)):
            mine = found(prediction, target, c)[i].numpy()
            np.testing.assert_allclose(mine, factor * root, rtol=1e-10)
    # far inside it is l2, and l2 / c; far outside 2 c |d|, and 2 |d|
    small = prediction.new_full((5, 1, 1, 1), 1e-7)
    far = prediction.new_full((5, 1, 1, 1), 1e7)
    nothing = torch.zeros_like(small)
    wide = c.view(-1, 1, 1, 1)
    assert_close(huber(small, nothing, c), small**2 + 0 * wide, rtol=1e-9, atol=0)
    assert_close(smooth_l1(small, nothing, c), small**2 / wide, rtol=1e-9, atol=0)
    assert_close(huber(far, nothing, c), 2 * wide * far, rtol=1e-6, atol=0)
    assert_close(smooth_l1(far, nothing, c), 2 * far + 0 * wide, rtol=1e-6, atol=0)


def test_small_errors_keep_their_digits_in_float32():
    # written as a difference, sqrt(d^2 + c^2) - c would be 0 here
    d = torch.full((1, 1, 1, 1), 1e-5)
    found = huber(d, torch.zeros_like(d), torch.ones(1, dtype=torch.float64))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(1e-10, rel=1e-5)


@pytest.mark.parametrize("curved", [huber, smooth_l1])
def test_the_gradient_is_that_of_the_formula_and_finite_where_nothing_is_wrong(curved: Any):
    prediction, target = pair()
    prediction[:, 0] = target[:, 0]
    prediction.requires_grad_()
    c = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    curved(prediction, target, c).sum().backward()
    d, wide = (prediction - target).detach(), c.view(-1, 1, 1, 1)
    slope = 2 * d / (d**2 + wide**2).sqrt()
    expected = slope * wide if curved is huber else slope
    assert prediction.grad is not None
    assert_close(prediction.grad, expected, rtol=1e-10, atol=1e-14)


def curved_or_plain(name: str) -> Any:
    loss = make_loss(options(name=name), sd15("epsilon"))
    return lambda prediction, target: loss(prediction, target, TIMESTEPS, {})


@pytest.mark.parametrize("name", ["l1", "l2", "huber", "smooth_l1"])
def test_a_16_bit_prediction_is_compared_in_the_targets_dtype(name: str):
    prediction, target = (tensor.float() for tensor in pair())
    rounded, error = prediction.bfloat16(), curved_or_plain(name)
    assert error(rounded, target).dtype == torch.float32
    assert torch.equal(error(rounded, target), error(rounded.float(), target))


# -- thresholds


@pytest.mark.parametrize("least", [0.01, 0.1, 1.0, 2.0])
def test_thresholds_are_those_of_the_formulas(least: float):
    process = sd15("epsilon")
    shares = process.alphas_cumprod.tolist()
    for t in (0, 1, 250, 500, 998, 999):
        sigma = math.sqrt((1 - shares[t]) / shares[t])
        expected = {
            ("snr", 1.0): (1 - least) / (1 + sigma) ** 2 + least,
            ("exponential", 1.0): math.exp(math.log(least) * t / 1000),
            ("exponential", 0.3): 0.3 * math.exp(math.log(least) * t / 1000),
            ("constant", 1.0): least,
            ("constant", 0.3): 0.3 * least,
        }
        for (schedule, scale), threshold in expected.items():
            words = {"name": "huber", "huber_schedule": schedule, "huber_scale": scale}
            found = huber_thresholds(options(**words, huber_c=least), process)
            assert found.dtype == torch.float64
            assert found[t].item() == pytest.approx(threshold, rel=1e-12)


def test_without_signal_the_snr_schedule_ends_at_its_least():
    thresholds = huber_thresholds(options(name="huber", huber_c=0.2), zero_terminal("v_prediction"))
    assert thresholds[-1].item() == 0.2
    assert thresholds.isfinite().all()
    assert (thresholds.diff() < 0).all()


@pytest.mark.parametrize(
    "row", GOLDEN["cond"], ids=lambda row: "-".join(map(str, row.values()))[:28]
)
def test_errors_and_thresholds_are_those_of_sd_scripts(row: dict[str, Any]):
    words = {"name": row["loss_type"]}
    if row["huber_schedule"]:
        words |= {word: row[word] for word in ("huber_schedule", "huber_c", "huber_scale")}
    chosen, timesteps = options(**words), torch.tensor(GOLDEN["timesteps"])
    prediction, target = (torch.tensor(GOLDEN[word]) for word in ("pred", "target"))
    process = sd_scripts("epsilon")
    if row["threshold"]:
        thresholds = huber_thresholds(chosen, process)[timesteps]
        assert thresholds.tolist() == pytest.approx(row["threshold"], rel=1e-6)
    found = make_loss(chosen, process)(prediction, target, timesteps, {})
    assert found.tolist() == pytest.approx(row["per_sample"], rel=1e-6)
    assert found.mean().item() == pytest.approx(row["mean"], rel=1e-6)
    # the exact shares differ from the fp32 ones of sd-scripts in their seventh digit
    exact = make_loss(chosen, sd15("epsilon"))(prediction, target, timesteps, {})
    assert exact.tolist() == pytest.approx(row["per_sample"], rel=1e-5)


# -- weights


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_weighted_loss_is_error_times_weight(kind: Any):
    prediction, target = pair()
    chosen = options(name="l1", weight={"name": "min_snr", "gamma": 2.0})
    found = make_loss(chosen, sd15(kind))(prediction, target, TIMESTEPS, {})
    share = sd15(kind).alphas_cumprod[TIMESTEPS]
    snr = share / (1 - share)
    weight = snr.clamp(max=2.0) / (snr if kind == "epsilon" else snr + 1)
    assert_close(found, (prediction - target).abs().mean((1, 2, 3)) * weight)


@pytest.mark.parametrize("weight", ["none", "min_snr", "debiased"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_weights_multiply_and_the_v_like_loss_is_added(kind: Any, weight: str):
    process = sd15(kind)
    words = {"scale_v_pred_like_noise": True} if kind == "v_prediction" else {"v_pred_like": 0.3}
    for asked in ({}, words):
        found = timestep_weights(options(weight={"name": weight}, **asked), process)
        if weight == "none" and not asked:
            assert found is None
            continue
        assert found is not None
        for t in (0, 1, 250, 500, 999):
            share = process.alphas_cumprod[t].item()
            snr = share / (1 - share)
            capped = min(snr, 1000)
            v = kind == "v_prediction"
            loss = {"none": 1.0, "min_snr": min(snr, 5) / (snr + v)}.get(
                weight, 1 / (capped + 1) if v else capped**-0.5
            )
            if asked:
                like_noise = capped / (capped + 1)
                loss = loss * like_noise if v else loss + 0.3 * loss / like_noise
            assert found[t].item() == pytest.approx(loss, rel=1e-11)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_without_signal_no_loss_that_is_allowed_is_nan_or_infinite(kind: Any):
    prediction, target = (tensor.requires_grad_() for tensor in pair())
    process, tried = zero_terminal(kind), 0
    names, weights = ("l2", "huber", "smooth_l1"), ("none", "min_snr", "debiased")
    for name, weight, scaled, like in product(names, weights, (False, True), (0.0, 0.5)):
        chosen = options(
            name=name, weight={"name": weight}, scale_v_pred_like_noise=scaled, v_pred_like=like
        )
        if loss_problems(chosen, process):
            continue
        tried += 1
        found = make_loss(chosen, process)(prediction, target, TIMESTEPS, {})
        found.sum().backward()
        assert found.isfinite().all()
        assert prediction.grad is not None
        assert prediction.grad.isfinite().all()
    assert tried == (18 if kind == "v_prediction" else 6)


@pytest.mark.parametrize("name", ["l1", "l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("weight", ["none", "min_snr", "debiased"])
def test_a_samples_loss_does_not_depend_on_its_mates(name: str, weight: str):
    loss = make_loss(options(name=name, weight={"name": weight}), sd15("epsilon"))
    prediction, target = pair()
    together = loss(prediction, target, TIMESTEPS, {})
    assert together.shape == (5,)
    for i in range(5):
        alone = loss(prediction[i : i + 1], target[i : i + 1], TIMESTEPS[i : i + 1], {})
        assert torch.equal(alone[0], together[i])


# -- masks and the weights of samples


def test_a_plain_mask_is_that_of_sd_scripts():
    error, out = (torch.tensor(GOLDEN["masked"][name]) for name in ("loss", "out"))
    mask = torch.tensor(GOLDEN["masked"]["alpha_masks"]).reshape(2, 1, 8, 2, 8, 2).mean((3, 5))
    assert_close(error * mask, out, rtol=1e-5, atol=0)
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
    mask = torch.from_numpy(np.random.default_rng(2).random((5, 1, 3, 2)))
    found = masked_mean(l2(prediction, target), mask, by_area=True)
    weights = mask.expand(5, 4, 3, 2).numpy()
    error = (prediction - target).numpy() ** 2
    expected = [float(np.average(e, weights=w)) for e, w in zip(error, weights, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["l2", "huber"])
@pytest.mark.parametrize(("mask", "by_area"), [("area", True), ("plain", False)])
def test_masks_and_weights_of_a_batch_reach_its_loss(name: str, mask: str, by_area: bool):
    prediction, target = pair()
    shape = torch.ones((5, 1, 3, 2), dtype=torch.float64)
    shape[:, :, 1:] = 0.25
    weighing = {"mask": shape, "weight": torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0]).double()}
    chosen, process = options(name=name, mask=mask), sd15("epsilon")
    loss = make_loss(chosen, process, masked=True, weighed=True)
    c = huber_thresholds(chosen, process)[TIMESTEPS]
    error = l2(prediction, target) if name == "l2" else huber(prediction, target, c)
    expected = masked_mean(error, shape, by_area=by_area) * weighing["weight"]
    assert_close(loss(prediction, target, TIMESTEPS, weighing), expected)
    plain = make_loss(chosen, process)
    assert_close(plain(prediction, target, TIMESTEPS, weighing), sample_mean(error))


# -- what is refused


@pytest.mark.parametrize("name", ["l1", "l2"])
@pytest.mark.parametrize(
    ("word", "value"), [("huber_schedule", "constant"), ("huber_c", 0.2), ("huber_scale", 2.0)]
)
def test_words_of_huber_are_refused_where_they_have_no_effect(name: str, word: str, value: Any):
    found = problem_of(name=name, **{word: value})
    assert found == (
        f"loss.{word} is {value}, which only huber and smooth_l1 use, and loss.name is {name}. "
        f"Write loss.name: huber, or leave {word} out."
    )


def test_the_snr_schedule_takes_no_scale():
    found = problem_of(name="huber", huber_scale=2.0, huber_schedule="snr")
    assert found.startswith("loss.huber_scale is 2, which the snr schedule does not use.")
    # Not said, it is the usual one of the base.
    unsaid = options(name="huber", huber_scale=2.0)
    assert loss_problems(unsaid, sd15("epsilon")) == [found]
    assert loss_problems(unsaid, Flow()) == []
    assert options(name="huber", huber_scale=2.0, huber_schedule="constant").huber_scale == 2
    assert "greater than 0" in problem_of(name="huber", huber_c=0.0)


def test_what_does_not_suit_the_base_is_told():
    epsilon, v = sd15("epsilon"), sd15("v_prediction")
    scaled, like = options(scale_v_pred_like_noise=True), options(v_pred_like=0.5)
    assert loss_problems(scaled, v) == loss_problems(like, epsilon) == []
    [problem] = loss_problems(scaled, epsilon)
    assert problem.startswith("loss.scale_v_pred_like_noise is for models that predict v")
    [problem] = loss_problems(like, v)
    assert problem.startswith("loss.v_pred_like is 0.5, which is for models that predict epsilon")


def test_weights_without_a_limit_are_told():
    debiased = options(weight={"name": "debiased"}, v_pred_like=0.5)
    assert loss_problems(debiased, sd15("epsilon")) == []
    first, second = loss_problems(debiased, zero_terminal("epsilon"))
    assert first.startswith("loss.weight.name: debiased: its weight is infinite at the last")
    assert second.startswith("loss.v_pred_like: its weight is infinite at the last timestep")
    assert loss_problems(options(weight={"name": "debiased"}), zero_terminal("v_prediction")) == []


def test_options_survive_their_own_record():
    for chosen in (LossOptions(), options(name="huber", huber_schedule="constant", huber_c=0.3)):
        assert LossOptions.model_validate(chosen.model_dump()) == chosen
