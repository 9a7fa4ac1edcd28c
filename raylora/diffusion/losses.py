"""Losses, one number a sample; nothing here averages over a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal, Self, cast, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raylora.base.options import Options, known_as
from raylora.diffusion.by_timestep import ByTimestep
from raylora.diffusion.process import AnyProcess, Flow, Process
from raylora.diffusion.weights import (
    FLOW_WEIGHTS,
    FlowWeight,
    SnrWeight,
    WeightOptions,
    debiased_weight,
    flow_weight,
    min_snr_weight,
    noise_like_weight,
    v_like_weight,
)

WEIGHING = ("mask", "weight")
"""What may come with a batch: (B, 1, H, W) in 0..1, where the loss counts; (B,), how much."""
SampleLoss = Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(prediction, target, timesteps, weighing) -> (B,) loss."""
HuberSchedule = Literal["snr", "exponential", "constant"]
_Errors = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(prediction, target, timesteps) -> (B, C, H, W)."""
_OfTimesteps = Callable[[Tensor], Tensor]
"""timesteps -> (B,) float64."""


class LossOptions(Options):
    """What is minimised."""

    name: Literal["l2", "l1", "huber", "smooth_l1"] = Field(
        "l2",
        json_schema_extra=known_as(
            formula="l2: d^2; l1: |d|; huber: 2 c (sqrt(d^2 + c^2) - c); smooth_l1: "
            "2 (sqrt(d^2 + c^2) - c), d = prediction - target",
            source="huber, smooth_l1: Charbonnier et al. 1997, as scaled in sd-scripts",
            sd_scripts="--loss_type",
        ),
    )
    """l2: mean squared error; l1: mean absolute error. huber and smooth_l1 are squares up to about
    `huber_c` and straight beyond, so that a few bad images or captions pull less; huber is of l2's
    size where errors are small, smooth_l1 of l1's where they are large."""
    huber_schedule: HuberSchedule | None = Field(
        None,
        json_schema_extra=known_as(
            formula="constant: c = scale huber_c; exponential: c = scale huber_c^(t / T); snr: "
            "c = (1 - huber_c) / (1 + sigma)^2 + huber_c, sigma = 1 / sqrt(SNR)",
            sd_scripts="--huber_schedule",
        ),
    )
    """How c of huber and smooth_l1 goes over the timesteps. snr and exponential: from nearly 1
    where latents are nearly clean, so that details are learned as by l2, down to `huber_c` in pure
    noise, where outliers do most harm. constant: `huber_c` everywhere. Null is snr, and exponential
    for flow models, which have no such ratio."""
    huber_c: float = Field(0.1, gt=0, json_schema_extra=known_as(sd_scripts="--huber_c"))
    """Where squares end in pure noise; smaller is more robust to outliers, and learns slower."""
    huber_scale: float = Field(1.0, gt=0, json_schema_extra=known_as(sd_scripts="--huber_scale"))
    """Multiplies c of the constant and the exponential schedule."""
    weight: WeightOptions = WeightOptions()
    """Weight by timestep."""
    scale_v_pred_like_noise: bool = Field(
        False,
        json_schema_extra=known_as(
            formula="loss min(SNR, 1000) / (min(SNR, 1000) + 1)",
            sd_scripts="--scale_v_pred_loss_like_noise_pred",
        ),
    )
    """For bases that predict v: weigh timesteps as an epsilon model's loss does."""
    v_pred_like: float = Field(
        0.0,
        ge=0,
        json_schema_extra=known_as(
            formula="loss + w loss (SNR + 1) / SNR, SNR at most 1000",
            sd_scripts="--v_pred_like_loss",
        ),
    )
    """For bases that predict epsilon: add this share of the loss a v model would have, which lets
    noisy samples count more."""
    mask: Literal["area", "plain"] = Field(
        "area",
        json_schema_extra=known_as(
            formula="area: sum(loss mask) / sum(mask); plain: mean(loss mask)",
            sd_scripts="--masked_loss, alpha_mask (plain)",
        ),
    )
    """Where images have masks. area: the mean over what counts, so a small subject weighs as much
    as a large one. plain: the mean over the whole picture with zeros outside, as in sd-scripts."""

    @model_validator(mode="after")
    def _every_word_has_an_effect(self) -> Self:
        curved = self.name in ("huber", "smooth_l1")
        for word in ("huber_schedule", "huber_c", "huber_scale"):
            value, default = getattr(self, word), LossOptions.model_fields[word].default
            if value != default and not curved:
                raise ValueError(
                    f"loss.{word} is {value}, which only huber and smooth_l1 use, and loss.name is "
                    f"{self.name}. Write loss.name: huber, or leave {word} out."
                )
        if self.huber_scale != 1 and self.huber_schedule == "snr":
            raise ValueError(_UNSCALED.format(self.huber_scale))
        return self

    def schedule_for(self, process: AnyProcess) -> HuberSchedule:
        """`huber_schedule`, or what is usual."""
        return self.huber_schedule or ("exponential" if isinstance(process, Flow) else "snr")


_UNSCALED = (
    "loss.huber_scale is {:g}, which the snr schedule does not use. Write loss.huber_schedule: "
    "constant or exponential, or leave huber_scale out."
)


def loss_problems(
    options: LossOptions, process: AnyProcess, family: str = "this base"
) -> list[str]:
    """What of the loss cannot be for this base, one sentence each.

    Args:
        process: as it is trained (`noise.trained_process`).
        family: the word for it.
    """
    if isinstance(process, Flow):
        return list(_flow_problems(options, family))
    found, v = [], process.prediction == "v_prediction"
    if options.weight.name in FLOW_WEIGHTS:
        found.append(
            f"loss.weight.name is {options.weight.name}, a weight of flow models' sigmas, and "
            f"{family} predicts {'v' if v else 'epsilon'}. Choose none, min_snr or debiased."
        )
    if options.huber_schedule is None and options.huber_scale != 1:
        found.append(_UNSCALED.format(options.huber_scale))
    if options.scale_v_pred_like_noise and not v:
        found.append(
            "loss.scale_v_pred_like_noise is for models that predict v, and this one predicts "
            "epsilon. Leave it out, or set noise.prediction."
        )
    if options.v_pred_like and v:
        found.append(
            f"loss.v_pred_like is {options.v_pred_like:g}, which is for models that predict "
            "epsilon, and this one predicts v. Leave it out."
        )
    endless = {
        "loss.weight.name: debiased": options.weight.name == "debiased",
        "loss.v_pred_like": options.v_pred_like > 0,
    }
    if not v and bool((process.alphas_cumprod == 0).any()):
        found += [
            f"{word}: its weight is infinite at the last timestep, where this base's schedule "
            "leaves no signal. Leave it out."
            for word, given in endless.items()
            if given
        ]
    return found


def _flow_problems(options: LossOptions, family: str) -> Iterator[str]:
    if options.weight.name in get_args(SnrWeight):
        yield (
            f"loss.weight.name is {options.weight.name}, which weighs by the signal-to-noise ratio "
            f"of models that predict epsilon or v, and {family} is a flow model. Choose none, "
            f"{', '.join(FLOW_WEIGHTS[:-1])} or {FLOW_WEIGHTS[-1]}."
        )
    if options.huber_schedule == "snr":
        yield (
            f"loss.huber_schedule is snr, a ratio of models that predict epsilon or v, and "
            f"{family} is a flow model. Choose exponential or constant, or leave it out."
        )
    for word, wanted in (("scale_v_pred_like_noise", "v"), ("v_pred_like", "epsilon")):
        value = getattr(options, word)
        if value:
            yield (
                f"loss.{word} is {str(value).lower()}, which is for models that predict {wanted}, "
                f"and {family} is a flow model. Leave it out."
            )


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error, (B, C, H, W), in the dtype of the target."""
    return (prediction.to(target.dtype) - target).square()


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute error, (B, C, H, W), in the dtype of the target."""
    return (prediction.to(target.dtype) - target).abs()


def smooth_l1(prediction: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """2 (sqrt(d^2 + c^2) - c), (B, C, H, W), in the dtype of the target: d^2 / c, then 2 |d|.

    Args:
        prediction, target: (B, C, H, W).
        c: (B,) above 0, where squares end.
    """
    squared, c = l2(prediction, target), c.to(target.dtype).view(-1, 1, 1, 1)
    # The difference of two like numbers, written so that small errors keep their digits.
    return 2 * squared / ((squared + c * c).sqrt() + c)


def huber(prediction: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """2 c (sqrt(d^2 + c^2) - c), (B, C, H, W), in the dtype of the target: d^2, then 2 c |d|."""
    return c.to(target.dtype).view(-1, 1, 1, 1) * smooth_l1(prediction, target, c)


def huber_thresholds(options: LossOptions, process: Process) -> Tensor:
    """Where squares end at each timestep, (steps,) float64."""
    if options.schedule_for(process) != "snr":
        share = torch.arange(process.steps, dtype=torch.float64) / process.steps
        return _threshold_at(share, options, process)
    alphas, least = process.alphas_cumprod, options.huber_c
    # 1 / (1 + sigma), sigma = sqrt((1 - alpha) / alpha), which is infinite without signal
    signal = alphas.sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())
    return (1 - least) * signal.square() + least


def _threshold_at(share: Tensor, options: LossOptions, process: AnyProcess) -> Tensor:
    """Of the schedules that look at t / T alone, (…) float64."""
    if options.schedule_for(process) == "constant":
        return torch.full_like(share, options.huber_scale * options.huber_c)
    return options.huber_scale * (share * math.log(options.huber_c)).exp()


def timestep_weights(options: LossOptions, process: Process) -> Tensor | None:
    """What each timestep's loss is multiplied by, (steps,) float64; None where by nothing."""
    snr, kind, weight = process.snr_by_timestep, process.prediction, options.weight
    found = []
    if weight.name == "min_snr":
        found.append(min_snr_weight(snr, gamma=weight.gamma, prediction=kind))
    if options.scale_v_pred_like_noise:
        found.append(noise_like_weight(snr))
    if options.v_pred_like:
        found.append(v_like_weight(snr, share=options.v_pred_like))
    if weight.name == "debiased":
        found.append(debiased_weight(snr, prediction=kind))
    return math.prod(found[1:], start=found[0]) if found else None


def sample_mean(error: Tensor) -> Tensor:
    """Mean of each sample, (B,)."""
    return error.flatten(1).mean(1)


def masked_mean(error: Tensor, mask: Tensor, *, by_area: bool) -> Tensor:
    """Mean of each sample's error where its mask counts, (B,).

    Args:
        error: (B, C, H, W).
        mask: (B, 1, H, W) in 0..1.
        by_area: divide by what counts instead of by the whole; a sample where nothing counts has 0.
    """
    mean = sample_mean(error * mask)
    if not by_area:
        return mean
    area = sample_mean(mask)
    return mean / area.where(area > 0, 1)


def make_loss(
    options: LossOptions, process: AnyProcess, *, masked: bool = False, weighed: bool = False
) -> SampleLoss:
    """Choose the loss once, so that the step only calls it.

    The order is that of sd-scripts: errors, mask, mean, the sample's weight, the timestep's.

    Args:
        process: as it is trained (`noise.trained_process`); nothing of `loss_problems` is left.
        masked: batches come with `mask`.
        weighed: batches come with `weight`.
    """
    errors_of, by_area = _make_errors(options, process), options.mask == "area"
    weights_of = _make_weights(options, process)

    def loss(
        prediction: Tensor, target: Tensor, timesteps: Tensor, weighing: Mapping[str, Tensor]
    ) -> Tensor:
        errors = errors_of(prediction, target, timesteps)
        if masked:
            found = masked_mean(errors, weighing["mask"], by_area=by_area)
        else:
            found = sample_mean(errors)
        if weighed:
            found = found * weighing["weight"]
        if weights_of is not None:
            found = found * weights_of(timesteps).to(target.dtype)
        return found

    return loss


def _make_weights(options: LossOptions, process: AnyProcess) -> _OfTimesteps | None:
    """Looked up where timesteps are numbered, reckoned where they are any numbers."""
    if not isinstance(process, Flow):
        weights = timestep_weights(options, process)
        return None if weights is None else ByTimestep(weights).at
    name = options.weight.name
    if name == "none":
        return None
    chosen = cast(FlowWeight, name)  # `loss_problems` lets no other pass
    return lambda timesteps: flow_weight(process.sigmas(timesteps), chosen)


def _make_errors(options: LossOptions, process: AnyProcess) -> _Errors:
    plain = {"l2": l2, "l1": l1}.get(options.name)
    if plain is not None:
        return lambda prediction, target, _: plain(prediction, target)
    curved = {"huber": huber, "smooth_l1": smooth_l1}[options.name]
    return partial(_curved_errors, curved, _make_thresholds(options, process))


def _make_thresholds(options: LossOptions, process: AnyProcess) -> _OfTimesteps:
    if isinstance(process, Flow):
        return lambda timesteps: _threshold_at(process.sigmas(timesteps), options, process)
    return ByTimestep(huber_thresholds(options, process)).at


def _curved_errors(
    curved: Callable[[Tensor, Tensor, Tensor], Tensor],
    threshold: _OfTimesteps,
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
) -> Tensor:
    return curved(prediction, target, threshold(timesteps))
