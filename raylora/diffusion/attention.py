"""Attention between tokens, by torch's own kernels, and which of them it is."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

NARROW = 16
"""On a CPU, heads narrower than this are filled up to it with zeros: BLAS takes half the time."""
Kernel = Literal["auto", "flash", "efficient", "cudnn", "math"]
"""`memory.attention`."""
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_TOKENS = 64  # of the trial; some kernels take no fewer than a tile


def attention(query_BTD: Tensor, key_BSD: Tensor, value_BSD: Tensor, *, heads: int) -> Tensor:
    """What each of T tokens gathers from S others, over several heads.

    Returns:
        (B, T, D).
    """
    split = [
        tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
        for tensor in (query_BTD, key_BSD, value_BSD)
    ]
    width = split[0].shape[-1]
    if width < NARROW and query_BTD.device.type == "cpu":
        split = [pad(tensor, (0, NARROW - width)) for tensor in split]
    query_BNTW, key_BNSW, value_BNSW = split
    gathered_BNTW = scaled_dot_product_attention(
        query_BNTW, key_BNSW, value_BNSW, scale=width**-0.5
    )
    return gathered_BNTW[..., :width].transpose(1, 2).flatten(2)


def attending_by(kernel: Kernel) -> AbstractContextManager[Any]:
    """Within it, attention is computed by this kernel alone; auto leaves the choice to torch.

    Whatever is computed again in the backward pass must be computed again within it.
    """
    return nullcontext() if kernel == "auto" else sdpa_kernel(_BACKENDS[kernel])


def kernel_problem(
    kernel: Kernel, *, device: torch.device, dtype: torch.dtype, widths: Iterable[int]
) -> str | None:
    """Why a device cannot attend by a kernel; None if it can.

    Args:
        dtype: of activations.
        widths: of the heads; see `head_widths`.
    """
    if kernel == "auto" or device.type == "meta":
        return None
    for width in sorted(set(widths)):
        told = _trial(kernel, device, dtype, width)
        if told is None:
            continue
        able = [
            f"{one}"
            for one in get_args(Kernel)
            if one not in ("auto", kernel) and _trial(one, device, dtype, width) is None
        ]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        return (
            f"memory.attention is {kernel}, and torch has no such kernel for {name} with heads "
            f"{width} wide in {str(dtype).removeprefix('torch.')} ({told}). Choose "
            f"{' or '.join(able)}, or leave memory.attention out."
        )
    return None


def head_widths(model: nn.Module) -> set[int]:
    """How wide the heads of a denoiser's attention are."""
    found = set()
    for layer in model.modules():
        heads, query = getattr(layer, "heads", None), getattr(layer, "to_q", None)
        if isinstance(heads, int) and query is not None:
            found.add(int(query.out_features) // heads)
    return found


def _trial(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """What torch says against attending so, forward and back; None where it does."""
    given = torch.zeros(1, _TOKENS, width, dtype=dtype, device=device, requires_grad=True)
    try:
        with attending_by(kernel), torch.enable_grad():
            attention(given, given, given, heads=1).sum().backward()
    except RuntimeError as error:
        return str(error).partition("\n")[0].rstrip(".")
    return None
