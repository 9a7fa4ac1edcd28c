"""LoRA: a frozen layer's output plus scale * up(down(x)).

Source: Hu et al. 2021, arXiv 2106.09685. Linear layers and convolutions.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raylora.base.site import Site
from raylora.networks import Draw, Gate, Network, NetworkOptions, Parameters


class LoraOptions(NetworkOptions):
    """Low-rank adapters on linear layers and 1x1 convolutions."""

    kind: Literal["lora"] = "lora"


def initial(options: NetworkOptions, site: Site, draw: Draw) -> dict[str, NDArray[np.float64]]:
    """`down` uniform within 1/sqrt(numbers in), `up` zero: a fresh adapter changes nothing.

    The bound is that of Kaiming's uniform with a = sqrt(5), which sd-scripts uses. `down` is (R, I)
    for a linear layer or a 1x1 convolution, (R, I, kh, kw) for a larger one; `up` (O, R).
    """
    rank, size = options.rank_at(site), site.kernel if site.kernel != (1, 1) else ()
    fan_in = site.inputs * int(np.prod(size))
    down = draw((rank, site.inputs, *size)) / np.sqrt(fan_in)
    return {"down": down, "up": np.zeros((site.outputs, rank))}


class _LowRank(torch.autograd.Function):
    """base + scale * x down^T up^T over tokens, keeping x and the rank-sized hidden for backward.

    Written out, because the usual wrapper keeps a copy of x in the adapter's dtype and the scaled
    and unscaled outputs, and dispatches three times as many operations.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down_RI: Tensor, up_OR: Tensor, base: Tensor, scale: float
    ) -> Tensor:
        x_NI, base_NO = x.flatten(0, -2), base.flatten(0, -2)
        # Rank first, here and below: BLAS is two to four times slower where a result is R wide.
        hidden_RN = down_RI.to(x.dtype) @ x_NI.T
        ctx.save_for_backward(x, down_RI, up_OR, hidden_RN)
        ctx.scale = scale
        adapted = torch.addmm(base_NO, hidden_RN.T, up_OR.to(x.dtype).T, alpha=scale)
        return adapted.view(base.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down_RI, up_OR, hidden_RN = ctx.saved_tensors
        grad_NO = grad.flatten(0, -2)
        grad_hidden_RN = up_OR.to(grad.dtype).T @ grad_NO.T
        grad_up_RO = hidden_RN @ grad_NO
        if ctx.scale != 1.0:
            grad_hidden_RN *= ctx.scale
            grad_up_RO *= ctx.scale
        grad_down = grad_hidden_RN @ x.flatten(0, -2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_hidden_RN.T @ down_RI.to(grad.dtype)).view(x.shape)
        return grad_x, grad_down, grad_up_RO.T, grad, None


class _LowRankConv(torch.autograd.Function):
    """The same over feature maps (B, I, H, W), P pixels, for 1x1 convolutions."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down_RI: Tensor, up_OR: Tensor, base: Tensor, scale: float
    ) -> Tensor:
        hidden_BRP = down_RI.to(x.dtype) @ x.flatten(2)
        ctx.save_for_backward(x, down_RI, up_OR, hidden_BRP)
        ctx.scale = scale
        up_BOR = up_OR.to(x.dtype).expand(len(x), -1, -1)
        adapted = torch.baddbmm(base.flatten(2), up_BOR, hidden_BRP, alpha=scale)
        return adapted.view(base.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down_RI, up_OR, hidden_BRP = ctx.saved_tensors
        grad_BOP = grad.flatten(2)
        grad_hidden_BRP = up_OR.to(grad.dtype).T @ grad_BOP
        grad_up_RO = (hidden_BRP @ grad_BOP.mT).sum(0)
        if ctx.scale != 1.0:
            grad_hidden_BRP *= ctx.scale
            grad_up_RO *= ctx.scale
        grad_down = (grad_hidden_BRP @ x.flatten(2).mT).sum(0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (down_RI.to(grad.dtype).T @ grad_hidden_BRP).view(x.shape)
        return grad_x, grad_down, grad_up_RO.T, grad, None


def forward(
    parameters: Parameters,
    x: Tensor,
    base_output: Tensor,
    scale: float,
    site: Site,
    gate: Gate | None = None,
) -> Tensor:
    """The adapted output.

    Args:
        parameters: `down` (R, I) or (R, I, kh, kw) and `up` (O, R); cast to x's dtype.
        x: (..., I) for a linear layer, (B, I, H, W) for a convolution.
        base_output: what the frozen layer gave, (..., O) or (B, O, H', W').
        scale: alpha / rank, times any strength.
        gate: dropout of the hidden; None drops nothing.
    """
    down, up = parameters["down"], parameters["up"]
    if gate is None and down.dim() == 2:
        low_rank = _LowRankConv if site.kind == "conv" else _LowRank
        adapted: Tensor = low_rank.apply(x, down, up, base_output, scale)  # type: ignore[no-untyped-call]
        return adapted
    down, up = down.to(x.dtype), up.to(x.dtype)
    if site.kind == "linear":
        hidden = F.linear(x, down)
        return base_output + scale * F.linear(hidden if gate is None else gate(hidden), up)
    kernel = down if down.dim() == 4 else down[:, :, None, None]
    hidden = F.conv2d(x, kernel, stride=site.stride, padding=site.padding)
    hidden = hidden if gate is None else gate(hidden)
    return base_output + scale * F.conv2d(hidden, up[:, :, None, None])


def export(parameters: Parameters, site: Site, scale: float) -> dict[str, Tensor]:
    """Tensors as kohya files hold them: 4-D for convolutions, alpha a number."""
    down, up = parameters["down"], parameters["up"]
    if site.kind == "conv":
        down, up = down if down.dim() == 4 else down[:, :, None, None], up[:, :, None, None]
    alpha = torch.tensor(scale * len(down), dtype=torch.float32)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}


network = Network(options=LoraOptions, initial=initial, forward=forward, export=export)
