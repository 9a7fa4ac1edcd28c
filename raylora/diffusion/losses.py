"""Losses, one number a sample; nothing here averages over a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor

from raylora.base.options import Options
from raylora.diffusion.process import Process

SampleLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(prediction, target, timesteps) -> (B,) loss."""


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


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,), in the dtype of the target."""
    return (prediction.to(target.dtype) - target).square().flatten(1).mean(1)


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of each sample, (B,), in the dtype of the target."""
    return (prediction.to(target.dtype) - target).abs().flatten(1).mean(1)


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


def make_loss(options: LossOptions, process: Process) -> SampleLoss:
    """Choose the loss once, so that the step only calls it."""
    error = {"l2": l2, "l1": l1}[options.name]
    if options.weight.name == "none":
        return lambda prediction, target, timesteps: error(prediction, target)
    gamma, kind = options.weight.gamma, process.prediction

    def weighted(prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        weight = min_snr_weight(process.snr(timesteps), gamma=gamma, prediction=kind)
        return error(prediction, target) * weight.to(target.dtype)

    return weighted
