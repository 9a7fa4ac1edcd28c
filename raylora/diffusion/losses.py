"""Losses, one number a sample; nothing here averages over a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from raylora.base.options import Options
from raylora.diffusion.process import Process

WEIGHING = ("mask", "weight")
"""What may come with a batch: (B, 1, H, W) in 0..1, where the loss counts; (B,), how much."""
SampleLoss = Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(prediction, target, timesteps, weighing) -> (B,) loss."""


class WeightOptions(Options):
    """How much each timestep counts."""

    name: Literal["none", "min_snr"] = "none"
    """none: every timestep alike. min_snr: nearly clean samples are capped (arXiv 2303.09556)."""
    gamma: float = Field(5.0, gt=0)
    """The cap of min_snr; smaller weighs timesteps more evenly."""


class LossOptions(Options):
    """What is minimised."""

    name: Literal["l2", "l1"] = "l2"
    """l2: mean squared error; l1: mean absolute error."""
    weight: WeightOptions = WeightOptions()
    """Weight by timestep."""
    mask: Literal["area", "plain"] = "area"
    """Where images have masks. area: the mean over what counts, so a small subject weighs as much
    as a large one. plain: the mean over the whole picture with zeros outside, as in sd-scripts."""


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error, (B, C, H, W), in the dtype of the target."""
    return (prediction.to(target.dtype) - target).square()


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute error, (B, C, H, W), in the dtype of the target."""
    return (prediction.to(target.dtype) - target).abs()


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


def min_snr_weight(snr: Tensor, *, gamma: float, prediction: str) -> Tensor:
    """Cap each sample's pull at `gamma`, so that nearly clean samples stop dominating.

    Args:
        snr: (B,), signal-to-noise ratio at each sample's timestep, not in decibels.
        gamma: the cap; 5.0 in the paper.
        prediction: "epsilon" divides by snr, "v_prediction" by snr + 1, since their errors
            scale so.

    Returns:
        (B,) in [0, 1].

    Source: Hang et al. 2023, arXiv 2303.09556.
    """
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1 if prediction == "v_prediction" else snr)


def make_loss(
    options: LossOptions, process: Process, *, masked: bool = False, weighed: bool = False
) -> SampleLoss:
    """Choose the loss once, so that the step only calls it.

    Args:
        masked: batches come with `mask`.
        weighed: batches come with `weight`.
    """
    error = {"l2": l2, "l1": l1}[options.name]
    by_area, gamma, kind = options.mask == "area", options.weight.gamma, process.prediction
    by_snr = options.weight.name == "min_snr"

    def loss(
        prediction: Tensor, target: Tensor, timesteps: Tensor, weighing: Mapping[str, Tensor]
    ) -> Tensor:
        errors = error(prediction, target)
        if masked:
            found = masked_mean(errors, weighing["mask"], by_area=by_area)
        else:
            found = sample_mean(errors)
        if weighed:
            found = found * weighing["weight"]
        if by_snr:
            weight = min_snr_weight(process.snr(timesteps), gamma=gamma, prediction=kind)
            found = found * weight.to(target.dtype)
        return found

    return loss
