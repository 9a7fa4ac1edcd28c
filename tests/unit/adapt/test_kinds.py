"""Every kind of adapter, against the LyCORIS project's own reader as another implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.adapt import kinds
from raylora.adapt.kinds import ALPHA, DORA, DOWN, MID, UP

LINEAR, CONV = (12, 8), (12, 8, 3, 3)
RANK = 3


def draw(*shape: int, seed: int = 0, size: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).float() * size


def alpha(value: float = 1.5) -> dict[str, Tensor]:
    return {ALPHA: torch.tensor(value)}


FILES: dict[str, tuple[tuple[int, ...], dict[str, Tensor]]] = {
    "lora": (LINEAR, {DOWN: draw(RANK, 8), UP: draw(12, RANK), **alpha()}),
    "lora conv": (CONV, {DOWN: draw(RANK, 8, 3, 3), UP: draw(12, RANK, 1, 1), **alpha()}),
    "lora tucker": (
        CONV,
        {
            DOWN: draw(RANK, 8, 1, 1),
            MID: draw(RANK, RANK, 3, 3),
            UP: draw(12, RANK, 1, 1),
            **alpha(),
        },
    ),
    "dora": (
        LINEAR,
        {DOWN: draw(RANK, 8), UP: draw(12, RANK), DORA: draw(12, 1).abs() + 0.5, **alpha()},
    ),
    "dora conv": (
        CONV,
        {
            DOWN: draw(RANK, 8, 3, 3),
            UP: draw(12, RANK, 1, 1),
            DORA: draw(12, 1, 1, 1).abs() + 0.5,
            **alpha(),
        },
    ),
    "loha": (
        LINEAR,
        {f"hada_w{n}_{h}": draw(*((12, RANK) if h == "a" else (RANK, 8)), seed=int(n))
         for n in "12" for h in "ab"} | alpha(),
    ),
    "loha conv": (
        CONV,
        {f"hada_w{n}_{h}": draw(*((12, RANK) if h == "a" else (RANK, 72)), seed=int(n))
         for n in "12" for h in "ab"} | alpha(),
    ),
    "loha tucker": (
        CONV,
        {f"hada_w{n}_{h}": draw(RANK, 12 if h == "a" else 8, seed=int(n))
         for n in "12" for h in "ab"}
        | {f"hada_t{n}": draw(RANK, RANK, 3, 3, seed=int(n)) for n in "12"} | alpha(),
    ),
    "lokr whole": (LINEAR, {"lokr_w1": draw(3, 2), "lokr_w2": draw(4, 4), **alpha(7.0)}),
    "lokr": (
        (24, 32),
        {"lokr_w1": draw(4, 4), "lokr_w2_a": draw(6, 2), "lokr_w2_b": draw(2, 8), **alpha()},
    ),
    "lokr conv": (
        (24, 32, 3, 3),
        {"lokr_w1": draw(4, 4), "lokr_w2_a": draw(6, 2), "lokr_w2_b": draw(2, 72), **alpha()},
    ),
    "glora": (
        LINEAR,
        {"a1.weight": draw(8, RANK), "a2.weight": draw(RANK, 8), "b1.weight": draw(12, RANK),
         "b2.weight": draw(RANK, 8), **alpha()},
    ),
    "glora conv": (
        CONV,
        {"a1.weight": draw(8, RANK, 1, 1), "a2.weight": draw(RANK, 8, 1, 1),
         "b1.weight": draw(12, RANK, 1, 1), "b2.weight": draw(RANK, 8, 3, 3), **alpha()},
    ),
    "full": (LINEAR, {"diff": draw(12, 8), "diff_b": draw(12)}),
    "oft": (LINEAR, {"oft_blocks": draw(4, 3, 3), **alpha(0.0)}),
    "oft conv": (
        CONV,
        {"oft_blocks": draw(4, 3, 3), "rescale": draw(12, 1, 1, 1) + 1, **alpha(0.0)},
    ),
    "oft limited": (LINEAR, {"oft_blocks": draw(4, 3, 3), **alpha(0.01)}),
    "oft within its limit": (LINEAR, {"oft_blocks": draw(4, 3, 3), **alpha(50.0)}),
    "boft": ((16, 8), {"oft_blocks": draw(3, 4, 4, 4), **alpha(0.0)}),
    "boft conv": ((16, 8, 3, 3), {"oft_blocks": draw(3, 4, 4, 4), **alpha(0.01)}),
}  # fmt: skip


def layer(shape: tuple[int, ...]) -> nn.Linear | nn.Conv2d:
    torch.manual_seed(0)
    outputs, inputs, *kernel = shape
    return nn.Conv2d(inputs, outputs, kernel[0]) if kernel else nn.Linear(inputs, outputs)


def lycoris_layer(shape: tuple[int, ...], tensors: dict[str, Tensor]) -> Any:
    from lycoris.modules import get_module, make_module

    kind, weights = get_module({f"x.{word}": tensor for word, tensor in tensors.items()}, "x")
    with torch.no_grad():
        return make_module(kind, weights, "x", layer(shape))


@pytest.mark.slow
@pytest.mark.parametrize("called", FILES)
def test_lycoris_reader_gives_the_same_layer(called: str) -> None:
    shape, tensors = FILES[called]
    assert kinds.fault(tensors) is None
    theirs = lycoris_layer(shape, tensors)
    base = theirs.org_module[0]
    held = {"weight": base.weight.detach(), "bias": base.bias.detach()}
    ours = kinds.merged(tensors, held)
    size = (2, shape[1], 6, 6) if len(shape) == 4 else (2, shape[1])
    x = draw(*size, seed=5, size=1.0)
    operation = nn.functional.conv2d if len(shape) == 4 else nn.functional.linear
    if called == "full":  # its forward takes the frozen layer apart
        found = operation(x, *(one.detach() for one in theirs.get_merged_weight()))
    else:  # and `get_merged_weight` multiplies LoHa's and LoKr's scale twice
        found = theirs.forward(x).detach()
    weight, bias = ours["weight"].float(), ours.get("bias", held["bias"]).float()
    wanted = operation(x, weight, bias)
    plain = operation(x, held["weight"], held["bias"])
    # Float32 on both sides; sums of 72 numbers of size 1.
    assert_close(found, wanted, rtol=0, atol=2e-5 * max(1.0, float(wanted.abs().max())))
    assert (wanted - plain).abs().max() > 1e-3


@pytest.mark.parametrize("on_input", [False, True])
def test_ia3_scales_rows_or_columns(on_input: bool) -> None:
    weight = draw(*LINEAR).double()
    numbers = draw(8 if on_input else 12)
    tensors = {"weight": numbers, "on_input": torch.tensor(int(on_input))}
    found = kinds.merged(tensors, {"weight": weight})["weight"]
    factors = 1 + (numbers[None] if on_input else numbers[:, None]).double()
    assert_close(found, weight * factors, rtol=1e-15, atol=0)


def test_a_norms_scale_and_shift_are_added_to() -> None:
    tensors = {"w_norm": draw(4), "b_norm": draw(4, seed=1)}
    found = kinds.merged(tensors, {"weight": torch.ones(4), "bias": torch.zeros(4)})
    assert_close(found["weight"], 1 + tensors["w_norm"].double(), rtol=0, atol=0)
    assert_close(found["bias"], tensors["b_norm"].double(), rtol=0, atol=0)


def test_dora_by_columns_keeps_the_stored_length_of_each_input() -> None:
    tensors = {DOWN: draw(RANK, 8), UP: draw(12, RANK), DORA: draw(1, 8).abs() + 1, **alpha()}
    found = kinds.merged(tensors, {"weight": draw(*LINEAR)})["weight"]
    assert_close(found.norm(dim=0), tensors[DORA].double()[0], rtol=1e-14, atol=0)


def test_lokr_of_two_whole_blocks_has_no_alpha_and_tuckers_rank_is_the_cores() -> None:
    assert kinds.scale_of(FILES["lokr whole"][1]) == 1.0
    tensors = {
        "lokr_w1": draw(2, 2),
        "lokr_t2": draw(RANK, RANK, 3, 3),
        "lokr_w2_a": draw(RANK, 6),
        "lokr_w2_b": draw(RANK, 4),
        **alpha(),
    }
    core = torch.einsum(
        "abhw,ao,bi->oihw",
        *(tensors[word].double() for word in ("lokr_t2", "lokr_w2_a", "lokr_w2_b")),
    )
    small = tensors["lokr_w1"].double()
    wanted = 0.5 * torch.einsum("ac,bdhw->abcdhw", small, core).reshape(12, 8, 3, 3)
    assert_close(kinds.change(tensors)["weight"], wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("called", FILES)
def test_what_needs_the_weight_says_so(called: str) -> None:
    shape, tensors = FILES[called]
    weights = [draw(*shape, seed=seed).double() for seed in (1, 2)]
    one, two = (kinds.change(tensors, weight)["weight"].reshape(shape) for weight in weights)
    assert kinds.is_additive(tensors) == torch.equal(one, two)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({UP: draw(3, 2)}, f"has no {DOWN}"),
        ({"hada_w1_a": draw(3, 2), "hada_w1_b": draw(2, 4)}, "has no hada_w2_a"),
        ({"lokr_w1": draw(2, 2)}, "has no lokr_w2, nor both"),
        ({DOWN: draw(2, 5), UP: draw(3, 2), "rescale": draw(3)}, "rescale, which does not belong"),
        ({"oft_blocks": draw(2, 3, 4)}, "shapes that do not fit"),
        ({"oft_blocks": draw(9)}, "shapes that do not fit"),
        ({"w_norm": draw(3, 2)}, "shapes that do not fit"),
        (
            {DOWN: draw(2, 5, 3, 3), MID: draw(2, 2, 3, 3), UP: draw(3, 2, 1, 1)},
            "shapes that do not fit",
        ),
        (
            {"a1.weight": draw(8, 2), "a2.weight": draw(3, 8), "b1.weight": draw(4, 2),
             "b2.weight": draw(2, 8)},
            "shapes that do not fit",
        ),
        ({"hada_t1": draw(2, 2)}, "has only hada_t1"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told(tensors: dict[str, Tensor], told: str) -> None:
    fault = kinds.fault(tensors)
    assert fault is not None
    assert told in fault
