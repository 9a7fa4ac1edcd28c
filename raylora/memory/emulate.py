"""What a device's own kernels hold, for passes on the meta device.

There torch takes attention and RMS norms apart, into products of all tokens with all and a float32
copy at each stage. Devices have kernels for them, which keep far less for the backward pass. Within
`kernels_of` a pass on the meta device is made of those.

They are put under the operations themselves, so that it also holds where a block is computed again
in the backward pass, where modes for functions do not reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Kernels = Literal["cuda", "cpu"]
"""Whose kernels."""
_ATEN = torch.ops.aten
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_WIDTH = 256
"""What flash attention computes in on a GPU, and how wide its heads are at most."""
_ROUNDED_TOKENS = 128
_ROUNDED_WIDTH = 32
"""Flash attention's backward pass adds up in tiles of so many queries and numbers."""


@contextmanager
def kernels_of(device: Kernels, *, attention: bool = True) -> Iterator[None]:
    """Within it, passes on the meta device hold what they would on a device of that kind.

    Args:
        attention: it has a kernel; else all tokens are multiplied with all (`attention: math`).
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        if attention:
            attend = _attend_on_cuda if device == "cuda" else _attend_on_cpu
            library.impl("scaled_dot_product_attention", attend, "AutogradMeta")
        if device == "cuda":
            library.impl("_fused_rms_norm", _rms_norm, "AutogradMeta")
        yield


def _attend_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention where it can, else memory-efficient attention; both hold as much."""
    _expect_plain(dropout_p, enable_gqa)
    if attn_mask is None and query.dtype in FLASH_DTYPES and query.shape[-1] <= FLASH_WIDTH:
        gathered: Tensor = _ATEN._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )[0]
        return gathered
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # becomes what is added, as torch does it
            added = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = added.masked_fill_(attn_mask, 0.0)
        attn_mask = attn_mask.expand((*query.shape[:-1], key.shape[-2]))
    needs = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    held: Tensor = _ATEN._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs, 0.0, is_causal, scale=scale
    )[0]
    return held


def _attend_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's flash attention for CPUs."""
    _expect_plain(dropout_p, enable_gqa)
    gathered: Tensor = _ATEN._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return gathered


def _expect_plain(dropout_p: float, enable_gqa: bool) -> None:
    assert not dropout_p, "no model here drops in attention"
    assert not enable_gqa, "no model here shares heads"


class _RmsNorm(torch.autograd.Function):
    """Keeps its input and a number for each row; moves what the kernel moves, computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = x.shape[: x.dim() - dims] + (1,) * dims
        scales = torch.empty(rows, dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, scales, weight)
        return x.clone(memory_format=torch.contiguous_format), scales

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, _, weight = ctx.saved_tensors
        needs = weight is not None and ctx.needs_input_grad[2]
        return torch.add(grad, x), None, torch.empty_like(weight) if needs else None


def _rms_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    normed: tuple[Tensor, Tensor] = _RmsNorm.apply(  # type: ignore[no-untyped-call]
        x, len(normalized_shape), weight
    )
    return normed


def backward_sums(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that attention's backward pass adds up in on a GPU, and has given back when it is done;
    0 for all else.

    They are the queries' gradient in float32, and a number for each query.
    """
    if func is not _ATEN._scaled_dot_product_flash_attention_backward.default:
        return 0
    query: Tensor = args[1]
    batch, heads, tokens, width = query.shape
    tokens = -(-tokens // _ROUNDED_TOKENS) * _ROUNDED_TOKENS
    width = -(-width // _ROUNDED_WIDTH) * _ROUNDED_WIDTH
    return batch * heads * tokens * (width + 1) * 4
