"""LoRA: a frozen layer's output plus scale * up(down(x)).

Source: Hu et al. 2021, arXiv 2106.09685. Linear layers and 1x1 convolutions.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylora.base.site import Site
from raylora.networks import Draw, Network, NetworkOptions, Parameters


class LoraOptions(NetworkOptions):
    """Low-rank adapters on linear layers and 1x1 convolutions."""

    kind: Literal["lora"] = "lora"


def initial(options: LoraOptions, site: Site, draw: Draw) -> dict[str, NDArray[np.float64]]:
    """`down` uniform within 1/sqrt(inputs), `up` zero: a fresh adapter changes nothing.

    The bound is that of Kaiming's uniform with a = sqrt(5), which sd-scripts uses.
    """
    down_RI = draw((options.rank, site.inputs)) / np.sqrt(site.inputs)
    return {"down": down_RI, "up": np.zeros((site.outputs, options.rank))}


class _LowRank(torch.autograd.Function):
    """base + scale * x down^T up^T, keeping only x and the rank-sized hidden for backward.

    Written out, because the usual wrapper keeps a copy of x in the adapter's dtype, the scaled
    and unscaled outputs, and dispatches three times as many operations.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, down_RI: Tensor, up_OR: Tensor, base_NO: Tensor, scale: float
    ) -> Tensor:
        hidden_NR = x_NI @ down_RI.to(x_NI.dtype).T
        ctx.save_for_backward(x_NI, down_RI, up_OR, hidden_NR)
        ctx.scale = scale
        return torch.addmm(base_NO, hidden_NR, up_OR.to(x_NI.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, down_RI, up_OR, hidden_NR = ctx.saved_tensors
        grad_hidden_NR = (grad_NO @ up_OR.to(grad_NO.dtype)).mul_(ctx.scale)
        grad_down = (grad_hidden_NR.T @ x_NI).to(down_RI.dtype)
        grad_up = (grad_NO.T @ hidden_NR).to(up_OR.dtype).mul_(ctx.scale)
        grad_x = grad_hidden_NR @ down_RI.to(grad_NO.dtype) if ctx.needs_input_grad[0] else None
        grad_base = grad_NO if ctx.needs_input_grad[3] else None
        return grad_x, grad_down, grad_up, grad_base, None


class _LowRankConv(torch.autograd.Function):
    """The same over feature maps laid out (B, I, P), P pixels, for 1x1 convolutions."""

    @staticmethod
    def forward(
        ctx: Any, x_BIP: Tensor, down_RI: Tensor, up_OR: Tensor, base_BOP: Tensor, scale: float
    ) -> Tensor:
        hidden_BRP = down_RI.to(x_BIP.dtype) @ x_BIP
        ctx.save_for_backward(x_BIP, down_RI, up_OR, hidden_BRP)
        ctx.scale = scale
        up = up_OR.to(x_BIP.dtype).expand(len(x_BIP), -1, -1)
        return torch.baddbmm(base_BOP, up, hidden_BRP, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad_BOP: Tensor) -> tuple[Tensor | None, ...]:
        x_BIP, down_RI, up_OR, hidden_BRP = ctx.saved_tensors
        grad_hidden_BRP = (up_OR.to(grad_BOP.dtype).T @ grad_BOP).mul_(ctx.scale)
        grad_down = (grad_hidden_BRP @ x_BIP.transpose(1, 2)).sum(0).to(down_RI.dtype)
        grad_up = (grad_BOP @ hidden_BRP.transpose(1, 2)).sum(0).to(up_OR.dtype).mul_(ctx.scale)
        grad_x = down_RI.to(grad_BOP.dtype).T @ grad_hidden_BRP if ctx.needs_input_grad[0] else None
        grad_base = grad_BOP if ctx.needs_input_grad[3] else None
        return grad_x, grad_down, grad_up, grad_base, None


def forward(parameters: Parameters, x: Tensor, base_output: Tensor, scale: float) -> Tensor:
    """The adapted output.

    Args:
        parameters: `down` (R, I) and `up` (O, R); cast to x's dtype for the products.
        x: (..., I) for a linear layer, (B, I, H, W) for a 1x1 convolution.
        base_output: what the frozen layer gave, (..., O) or (B, O, H, W).
        scale: alpha / rank, times any strength.
    """
    down, up = parameters["down"], parameters["up"]
    if x.dim() == 4:
        adapted = _LowRankConv.apply(x.flatten(2), down, up, base_output.flatten(2), scale)  # type: ignore[no-untyped-call]
    else:
        flat_x = x.reshape(-1, x.shape[-1])
        flat_base = base_output.reshape(-1, base_output.shape[-1])
        adapted = _LowRank.apply(flat_x, down, up, flat_base, scale)  # type: ignore[no-untyped-call]
    assert isinstance(adapted, Tensor)
    return adapted.view(base_output.shape)


def export(parameters: Parameters, site: Site, options: LoraOptions) -> dict[str, Tensor]:
    """Tensors as kohya files hold them: 4-D for convolutions, alpha a number."""
    down, up = parameters["down"], parameters["up"]
    if site.kind == "conv":
        down, up = down[:, :, None, None], up[:, :, None, None]
    alpha = torch.tensor(options.scale * options.rank, dtype=torch.float32)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}


network = Network(options=LoraOptions, initial=initial, forward=forward, export=export)
