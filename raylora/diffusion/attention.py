"""Attention between tokens, by torch's own kernels."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

_NARROW = 16
"""On a CPU, heads narrower than this are filled up to it with zeros: BLAS takes half the time."""


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
    if width < _NARROW and query_BTD.device.type == "cpu":
        split = [pad(tensor, (0, _NARROW - width)) for tensor in split]
    query_BNTW, key_BNSW, value_BNSW = split
    gathered_BNTW = scaled_dot_product_attention(
        query_BNTW, key_BNSW, value_BNSW, scale=width**-0.5
    )
    return gathered_BNTW[..., :width].transpose(1, 2).flatten(2)
