"""The optimizer's step against its paper, and its options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from raylora.optim.optimizers import OptimizerOptions, make_optimizer


def test_adamw_is_the_papers():
    """Loshchilov & Hutter 2019, algorithm 2, in float64; the rate changes from step to step."""
    random = np.random.default_rng(0)
    weight, gradients = random.normal(size=30), random.normal(size=(5, 30))
    options = OptimizerOptions(learning_rate=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    values = nn.Parameter(torch.from_numpy(weight.copy()))
    values.grad = torch.zeros_like(values)
    optimizer = make_optimizer(options, values)
    mean, variance = np.zeros(30), np.zeros(30)
    for t, gradient in enumerate(gradients, start=1):
        rate = 3e-3 / t
        optimizer.param_groups[0]["lr"] = rate
        values.grad.copy_(torch.from_numpy(gradient))
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        variance = 0.95 * variance + 0.05 * gradient**2
        corrected = (mean / (1 - 0.8**t)) / (np.sqrt(variance / (1 - 0.95**t)) + 1e-6)
        weight = weight - rate * (corrected + 0.1 * weight)
    assert values.detach().numpy() == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": 0}, {"eps": 0}, {"weight_decay": -1}, {"max_grad_norm": -1}]
)
def test_what_would_break_the_step_is_refused(wrong: dict[str, float]):
    with pytest.raises(ValidationError, match="greater than"):
        OptimizerOptions(**wrong)


@pytest.mark.parametrize("betas", [(1.0, 0.999), (0.9, 1.0), (-0.1, 0.9)])
def test_betas_that_remember_for_ever_are_refused(betas: tuple[float, float]):
    with pytest.raises(ValidationError, match=r"less than 1|greater than or equal to 0"):
        OptimizerOptions(betas=betas)
