"""Linears in fewer bits on a GPU: the same bits as on a CPU, and the memory that is promised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.base.lookup import plugins
from raylora.base.unit import Unit
from raylora.memory.bases import HeldLinear, base_problem, get_base, hold_linears

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(bool(problem), reason=problem or ""))
    for kind in plugins("raylora.memory.bases")
    for problem in [base_problem(kind)]  # type: ignore[arg-type]
]
every_kind = pytest.mark.parametrize("kind", KINDS)
OURS = ["int8", "fp8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRAIN = 512  # torch's allocator hands out multiples of it


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def layer_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer.requires_grad_(False)


def held(kind: Any, weight: Tensor, device: torch.device) -> HeldLinear:
    return get_base(kind).make(layer_of(weight), device)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("shape", [(320, 1280), (50, 14), (1, 64)])
def test_the_packed_bits_are_those_of_a_cpu(kind: str, shape: tuple[int, int]):
    weight = normal(1, *shape)
    weight.view(-1)[0] *= 1000
    here, there = held(kind, weight, CPU), held(kind, weight, GPU)
    for name, buffer in here.named_buffers():
        assert torch.equal(there.get_buffer(name).cpu(), buffer), name


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_weight_that_is_brought_back_is_that_of_a_cpu(kind: str, dtype: torch.dtype):
    here, there = (held(kind, normal(2, 96, 320), device).to(dtype) for device in (CPU, GPU))
    assert torch.equal(there.weight.cpu(), here.weight)
    assert torch.equal(here.to(GPU).weight, there.weight)


@pytest.mark.skipif(base_problem("nf4") is not None, reason="no bitsandbytes")
def test_nf4_packed_on_a_cpu_comes_back_on_a_gpu():
    # float32 products of a table's entry and a scale on both; a fused one may round otherwise.
    layer = held("nf4", normal(3, 256, 320), CPU)
    here = layer.weight
    assert_close(layer.to(GPU).weight.cpu(), here, rtol=1e-6, atol=0)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradient_are_those_of_a_linear_with_that_weight(kind: str, dtype: torch.dtype):
    layer = held(kind, normal(4, 256, 320, dtype=dtype), GPU)
    plain = layer_of(layer.weight.cpu()).to(GPU)
    plain.bias.data.copy_(layer.bias)
    given = normal(5, 3, 64, 320, dtype=dtype).to(GPU)
    of_y = normal(6, 3, 64, 256, dtype=dtype).to(GPU)
    found = []
    for one in (layer, plain):
        x = given.clone().requires_grad_()
        y = one(x)
        y.backward(of_y)
        found.append((y.detach(), x.grad))
    # The same products; where cuBLAS takes another kernel they are summed in another order.
    eps = torch.finfo(torch.float16 if dtype == torch.float16 else dtype).eps
    assert_close(found[0], found[1], rtol=2 * eps, atol=64 * eps)


def stack(count: int, width: int) -> nn.Sequential:
    layers = [layer_of(normal(seed, width, width, dtype=torch.bfloat16)) for seed in range(count)]
    return nn.Sequential(*layers)


@every_kind
def test_memory_is_that_of_the_packed_weights_and_one_brought_back(kind: str):
    count, width, rows = 6, 2048, 16
    weight_bytes = 2 * width * width
    model = stack(count, width)
    before = torch.cuda.memory_allocated()
    hold_linears(Unit("stack", model), kind, GPU)  # type: ignore[arg-type]
    packed = torch.cuda.memory_allocated() - before
    said = count * (get_base(kind).bytes_of(width, width) + 2 * width)  # type: ignore[arg-type]
    assert said <= packed <= said + count * 3 * GRAIN
    assert packed < 0.6 * count * weight_bytes
    x = normal(9, rows, width, dtype=torch.bfloat16).to(GPU).requires_grad_()
    model(x).sum().backward()  # cuBLAS takes its workspace on the first call
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(x).sum().backward()
    above = torch.cuda.max_memory_allocated() - before
    activations = (count + 4) * rows * width * 2
    assert above < 1.1 * weight_bytes + 2 * activations
    assert torch.cuda.memory_allocated() - before <= rows * width * 2 + GRAIN


@every_kind
def test_packing_takes_no_more_than_a_few_of_the_largest_weight(kind: str):
    width = 2048
    model = stack(3, width)
    hold_linears(Unit("warm", stack(1, 64)), kind, GPU)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    hold_linears(Unit("stack", model), kind, GPU)  # type: ignore[arg-type]
    above = torch.cuda.max_memory_allocated() - before
    kept = torch.cuda.memory_allocated() - before
    # Of one weight: 2 bytes as it came, 4 to work on, and what a kernel leaves between.
    assert above - kept < 12 * width * width
