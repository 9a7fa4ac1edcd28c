"""Attention against its formula, narrow and wide heads alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from raylora.diffusion.attention import attention


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def written_out(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Vaswani et al. 2017: softmax(Q K^T / sqrt(width)) V, head by head."""
    gathered = []
    for q, k, v in zip(*(t.chunk(heads, dim=-1) for t in (query, key, value)), strict=True):
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        gathered.append(weights @ v)
    return torch.cat(gathered, dim=-1)


@pytest.mark.parametrize("width", [4, 15, 16, 40])
def test_attention_and_its_gradients_are_the_papers(width: int):
    shapes = [(2, 6, 3 * width), (2, 9, 3 * width), (2, 9, 3 * width)]
    ours = [normal(i, *shape).requires_grad_() for i, shape in enumerate(shapes)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    found, expected = attention(*ours, heads=3), written_out(*theirs, heads=3)
    assert_close(found, expected, rtol=0, atol=1e-13)
    upstream = normal(9, *found.shape)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine.grad, other.grad, rtol=0, atol=1e-12)
