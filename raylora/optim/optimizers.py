"""Optimizers by name. They see one flat parameter, so a step is a handful of operations."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from raylora.base.options import Options

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerOptions(Options):
    """How the adapter is moved."""

    name: Literal["adamw"] = "adamw"
    """adamw: Adam with decoupled weight decay."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak rate, at strength alpha / rank = 1; 1e-4 is usual for SD 1.5."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Memory of the mean and of the variance of the gradient."""
    eps: float = Field(1e-8, gt=0)
    """Keeps the division finite where gradients vanish."""
    weight_decay: float = Field(0.01, ge=0)
    """Pull of every weight to zero, times the rate."""
    max_grad_norm: float = Field(1.0, ge=0)
    """The gradient of a whole global step is shortened to this length; 0 leaves it as it is."""


def make_optimizer(options: OptimizerOptions, values: nn.Parameter) -> torch.optim.Optimizer:
    """The optimizer over the adapter's flat buffer."""
    return torch.optim.AdamW(
        [values],
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,  # one pass over the buffer: on a CPU a tenth of the time for a large adapter
    )
