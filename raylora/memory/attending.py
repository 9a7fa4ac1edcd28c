"""`memory.attention`: which kernel a denoiser attends by, also where it is computed again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import nn

from raylora.base.errors import OptionError
from raylora.diffusion.attention import Kernel, attending_by, head_widths, kernel_problem
from raylora.memory.checkpoint import recomputing_in

Given = TypeVar("Given")


def predicting_by(kernel: Kernel, predict: Callable[..., Given]) -> Callable[..., Given]:
    """A family's prediction, by this kernel alone; text encoders and VAEs are left to torch."""
    if kernel == "auto":
        return predict

    @wraps(predict)
    def by_kernel(*inputs: Any, **words: Any) -> Given:
        with attending_by(kernel), recomputing_in(partial(attending_by, kernel)):
            return predict(*inputs, **words)

    return by_kernel


def check_kernel(
    kernel: Kernel, denoiser: nn.Module, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Try the kernel on the device, before anything hangs on it.

    Raises:
        OptionError: the device has none for this denoiser.
    """
    problem = kernel_problem(kernel, device=device, dtype=dtype, widths=head_widths(denoiser))
    if problem:
        raise OptionError(problem)
