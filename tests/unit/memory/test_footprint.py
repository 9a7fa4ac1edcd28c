"""Steps without numbers: what operations give, what kernels hold, how work is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raylora.base.unit import Unit
from raylora.memory.checkpoint import again
from raylora.memory.emulate import Kernels
from raylora.memory.footprint import IMAGES, RANK, Measured, measure, measure_model
from raylora.memory.operations import run

ATEN = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


OPERATIONS: list[tuple[Any, tuple[Any, ...]]] = [
    (ATEN.addmm.default, (meta(5), meta(3, 4), meta(4, 5))),
    (ATEN.native_layer_norm.default, (meta(2, 8), [8], meta(8), None, 1e-5)),
    (ATEN.gelu.default, (meta(4, 6).t(),)),
    (ATEN.add.Tensor, (meta(4, 1), meta(1, 6, dtype=torch.float32))),
    (ATEN.mul.Tensor, (meta(3, dtype=torch.int64), 2)),
    (ATEN.mul.Tensor, (meta(3, dtype=torch.int64), 2.0)),
    (ATEN.cat.default, ([meta(2, 3), meta(4, 3)], 0)),
    (
        ATEN.convolution.default,
        (meta(2, 3, 8, 8), meta(5, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
    ),
    (ATEN._to_copy.default, (torch.zeros(1, 6).expand(4, 6),)),
    (ATEN.sum.dim_IntList, (meta(4, 6), [0], True)),
]


@pytest.mark.parametrize(("func", "args"), OPERATIONS, ids=lambda one: str(one)[:20])
def test_an_operation_that_is_known_gives_what_it_gave(func: Any, args: tuple[Any, ...]) -> None:
    words = {"device": torch.device("meta")} if func is ATEN._to_copy.default else {}
    expected = func(*args, **words)
    for _ in range(2):
        found, _ = run(func, args, words)
        for one, other in zip(_listed(found), _listed(expected), strict=True):
            assert (one.shape, one.stride(), one.dtype) == (
                other.shape,
                other.stride(),
                other.dtype,
            )
            assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [one for one in result if one is not None]


def test_what_changes_its_argument_gives_it_back_and_a_hidden_view_stays_one() -> None:
    for _ in range(2):
        one, other = meta(4, 6), meta(4, 6)
        changed, _ = run(ATEN.add_.Tensor, (one, other), {})
        assert changed is one
        viewed, _ = run(ATEN._unsafe_view.default, (one, [24]), {})
        assert viewed.untyped_storage()._cdata == one.untyped_storage()._cdata


# -- kernels

HEADS, WIDTH = 4, 64


def attended(tokens: int, kernels: Kernels, *, attention: bool = True, repeat: bool = False) -> int:
    """Most bytes an image that attention holds beyond its arguments, forward and backward."""
    q, k, v = (meta(IMAGES, HEADS, tokens, WIDTH, grad=True) for _ in range(3))

    def step() -> None:
        attend: Callable[..., Tensor] = F.scaled_dot_product_attention
        out = again(attend, q, k, v) if repeat else attend(q, k, v)
        torch.autograd.grad(out, (q, k, v), out.detach())

    found = measure(step, held=[q, k, v], kernels=kernels, attention=attention)
    return found.curve().at(1)


def test_attention_holds_its_output_its_sums_and_its_gradients() -> None:
    tokens = 256
    one = HEADS * tokens * WIDTH * 2  # bf16
    sums, exact = HEADS * tokens * 4, HEADS * tokens * (WIDTH + 1) * 4
    # Output, which is its own gradient here, three gradients, and float32 sums meanwhile.
    assert attended(tokens, "cuda") == pytest.approx(4 * one + sums + exact, abs=4096)
    assert attended(tokens, "cpu") == pytest.approx(4 * one + sums, abs=4096)


@pytest.mark.parametrize("kernels", ["cuda", "cpu"])
@pytest.mark.parametrize("repeat", [False, True])
def test_attention_never_holds_tokens_times_tokens(kernels: Kernels, repeat: bool) -> None:
    few, many = (attended(tokens, kernels, repeat=repeat) for tokens in (1024, 4096))
    assert many == pytest.approx(4 * few, rel=0.01)
    assert attended(4096, kernels, attention=False) > HEADS * 4096**2


def test_an_rms_norm_of_a_gpu_keeps_its_input_and_a_number_for_each_row() -> None:
    norm = nn.RMSNorm(WIDTH, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    x = meta(IMAGES, 32, WIDTH, grad=True)
    kept: list[Tensor] = []

    def step() -> None:
        kept.append(norm(x))

    found = measure(step, held=[x, norm.weight]).curve().at(1)
    assert found == 32 * WIDTH * 2 + 512  # its output, and 32 float32 in one block
    on_cpu = measure(step, held=[x, norm.weight], kernels="cpu").curve().at(1)
    assert on_cpu > 3 * found  # float32 copies, as torch takes it apart


def test_a_step_on_meta_leaves_attention_elsewhere_and_afterwards_as_it_was() -> None:
    q = torch.randn(1, 2, 8, 16)
    expected = F.scaled_dot_product_attention(q, q, q)
    inside: list[Tensor] = []
    measure(lambda: inside.append(F.scaled_dot_product_attention(q, q, q)), held=[])
    assert torch.equal(inside[0], expected)
    assert attended(512, "cuda", attention=False) > attended(512, "cuda")


# -- work


def linear_step(wide: int, out: int, tokens: int, **words: Any) -> Measured:
    layer = nn.Linear(wide, out, device="meta").requires_grad_(False)
    x = meta(IMAGES, tokens, wide, dtype=torch.float32, grad=True)
    x.grad = torch.empty_like(x)

    def step() -> None:
        layer(x).sum().backward()

    return measure(step, held=[x, x.grad, *layer.parameters()], **words)


def test_products_are_two_flops_for_each_of_their_numbers() -> None:
    work = linear_step(48, 80, 10).at().work
    assert work.matmul_flops == 2 * (2 * 10 * 48 * 80)  # forward, and the input's gradient
    assert work.attention_flops == 0


def test_attention_is_two_products_forward_and_five_backward() -> None:
    q = meta(IMAGES, HEADS, 128, WIDTH, grad=True)

    def step() -> None:
        F.scaled_dot_product_attention(q, q, q).sum().backward()

    work = measure(step, held=[q]).at().work
    product = 2 * HEADS * 128 * 128 * WIDTH
    assert (work.attention_flops, work.matmul_flops) == (7 * product, 0)


def test_what_else_is_done_is_counted_by_what_it_reads_and_writes() -> None:
    x = meta(IMAGES, 1000, dtype=torch.float32)
    shift = meta(1000, dtype=torch.float32)
    work = measure(lambda: (x + shift).mul_(2), held=[x, shift]).at().work
    # x and the sum of each image, the shift once; then the sum read and written.
    assert work.moved_bytes == (4000 + 4000 + 4000) + (4000 + 4000)
    assert work.launches == 2


def test_work_of_a_rank_is_told_apart() -> None:
    down, up = meta(RANK, 48, grad=True), meta(80, RANK, grad=True)
    x = meta(IMAGES, 10, 48)

    def step() -> None:
        ((x @ down.T) @ up.T).sum().backward()

    found = measure(step, held=[x, down, up], rank=RANK)
    inner = 2 * 10 * (48 + 80)
    # Forward; of both halves the weight's gradient; the hidden's.
    assert found.matmul_flops == (0, inner + inner + 2 * 10 * 80)
    assert found.at(4).work.matmul_flops == 4 * found.matmul_flops[1]


# -- inputs and models


def test_inputs_of_what_is_computed_again_are_counted_once() -> None:
    layers = [nn.Linear(64, 64, device="meta").requires_grad_(False) for _ in range(3)]
    x = meta(IMAGES, 16, 64, dtype=torch.float32, grad=True)

    def step() -> None:
        a = again(layers[0], x)
        (again(layers[1], a) + again(layers[2], a)).sum().backward()

    found = measure(step, held=[x], modules=layers)
    assert found.inputs_per_image == 2 * 16 * 64 * 4


def test_all_numbers_of_a_model_are_in_its_units_or_outside() -> None:
    block = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4, bias=False))
    model = nn.ModuleDict({"block": block, "out": nn.Conv2d(3, 5, 3), "norm": nn.BatchNorm1d(7)})
    need = measure_model(model, [Unit("model.block", block)])
    assert need.units[0].linear_numbers == 8 * 16 + 16 * 4
    assert need.units[0].other_numbers == 16 + 2 * 16
    assert need.units[0].largest_linear == 8 * 16
    assert need.units[0].linear_rows == 16 + 4
    everything = [*model.parameters(), *model.buffers()]
    assert need.numbers == sum(one.numel() for one in everything)
