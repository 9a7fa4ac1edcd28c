"""Comparing what a reader found with what was trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from adapters import SD15, SHAPES, as_trained, random_adapter, random_module
from torch import Tensor

from raylora.adapt.deltas import LowRank, at_scale, delta
from raylora.adapt.lora_file import ALPHA, DOWN, UP, AdapterModule
from raylora.adapt.proof import packed
from raylora.adapt.proof_worker import Comparison, compare, unpacked
from raylora.adapt.rounding import low_rank_bound

MODULES = random_adapter()
NAMES = list(SHAPES)


def module(name: str, down: Tensor, up: Tensor, scale: float) -> AdapterModule:
    alpha = torch.tensor(scale * len(down), dtype=torch.float64)
    return AdapterModule(name, {DOWN: down, UP: up, ALPHA: alpha})


def compared(
    read: Sequence[AdapterModule],
    wanted: Sequence[AdapterModule],
    dtype: torch.dtype = torch.float32,
) -> Comparison:
    held = {one.name: one for one in read}
    return compare(held, as_trained(wanted), stored=held, dtype=dtype)


def rounded(pair: LowRank, dtype: torch.dtype) -> LowRank:
    down, up, scale = pair
    return down.to(dtype), up.to(dtype), scale


def test_the_same_weights_pass() -> None:
    found = compared(MODULES, MODULES)
    assert found.problems == ()
    assert found.modules == len(SHAPES)
    assert found.worst < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 1.0, 100.0])
def test_rounding_to_the_files_dtype_is_within_the_bound(dtype: torch.dtype, size: float) -> None:
    # Small sizes fall among float16's subnormals, where rounding is absolute.
    for seed in range(5):
        down, up, scale = random_module("m", (40, 30), seed=seed).low_rank
        pair = (down, up * size, scale)
        moved = float((delta(*rounded(pair, dtype)) - delta(*pair)).norm())
        bound = low_rank_bound(pair, dtype)
        assert moved <= bound
        unit = torch.finfo(dtype).eps / 2
        if size >= 1e-3:
            # Frobenius norms multiply to some twice ‖ΔW‖ at rank 4, so no looser than 8 roundings.
            assert bound <= 8 * unit * float(delta(*pair).norm())


def test_a_bound_is_too_tight_for_a_scale_off_by_a_hundredth() -> None:
    for dtype in (torch.float32, torch.float16):
        down, up, scale = rounded(MODULES[0].low_rank, dtype)
        off = module(NAMES[0], down, up, scale * 1.01)
        found = compared([off], MODULES[:1], dtype)
        assert found.problems == (f"ΔW differs: {NAMES[0]} by 1.0%",)


def test_missing_and_extra_modules_are_named() -> None:
    other = replace(MODULES[1], name="unet.other")
    assert compared([MODULES[0], *MODULES[2:], other], MODULES).problems == (
        f"missing from the file: {NAMES[1]}",
        "in the file but never trained: unet.other",
    )


def test_the_worst_modules_are_named_first_and_the_rest_counted() -> None:
    read = [
        module(one.name, one.tensors[DOWN], one.tensors[UP] * (1 + (index + 1) / 10), 0.5)
        for index, one in enumerate(MODULES)
    ]
    found = compared(read, MODULES)
    assert found.worst_module == NAMES[-1]
    assert found.worst == pytest.approx(0.9, rel=1e-6)
    assert found.problems[0].startswith(f"ΔW differs: {NAMES[-1]} by 90.0%, {NAMES[-2]} by 80.0%")
    assert found.problems[0].endswith("and 4 more")


def test_another_shape_nan_and_a_module_that_should_do_nothing_are_faults() -> None:
    down, up, scale = MODULES[0].low_rank
    for read in ((down.T, up, scale), (down[:, :3], up, scale), (down * math.nan, up, scale)):
        found = compared([module(NAMES[0], *read)], MODULES[:1])
        assert found.problems
        assert not found.worst <= 1
    nothing = module(NAMES[0], down, torch.zeros_like(up), scale)
    assert compared(MODULES[:1], [nothing]).problems
    assert compared([nothing], [nothing]).problems == ()


def test_a_fresh_adapter_passes_since_up_is_zero_whether_or_not_it_is_in_the_file() -> None:
    fresh = [
        module(one.name, one.tensors[DOWN], torch.zeros_like(one.tensors[UP]), 0.5)
        for one in MODULES
    ]
    assert compared(fresh, fresh).worst == 0
    # Parts of a joined layer that change nothing cannot be told from parts that are not there.
    assert compared(fresh[1:], fresh).problems == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 40.0])
def test_halves_folded_to_another_scale_and_rounded_are_within_the_bound(
    dtype: torch.dtype, size: float, scale: float
) -> None:
    for seed in range(3):
        down, up, own = random_module("m", (40, 30), seed=seed).low_rank
        pair = (down, up * size, own)
        read = rounded(at_scale(pair, scale), dtype)
        wanted = [module("m", *pair)]
        assert compared([module("m", *read)], wanted, dtype).problems == ()
        off = module("m", read[0], read[1] * (1 + 30 * torch.finfo(dtype).eps), scale)
        if size >= 1e-3:
            assert compared([off], wanted, dtype).problems


def test_a_module_that_adds_nothing_may_be_there_besides() -> None:
    down, up, scale = MODULES[0].low_rank
    nothing = module("unet.other", torch.zeros_like(down), torch.zeros_like(up), scale)
    assert compared([*MODULES, nothing], MODULES).problems == ()
    for wrong in ((down, up, scale), (down * math.nan, up, scale)):
        assert compared([*MODULES, module("unet.other", *wrong)], MODULES).problems


def test_what_is_sent_to_the_far_side_arrives_there() -> None:
    trained, names = unpacked(packed(as_trained(MODULES), replace(SD15, config={"a": [1]})))
    sent = as_trained(MODULES)
    assert (trained.kind, trained.sites, trained.scales) == (sent.kind, sent.sites, sent.scales)
    assert (names.kind, names.config) == ("sd15", {"a": [1]})
    for site in sent.sites:
        assert names.place(site.name) == SD15.place(site.name)
        for word, held in sent.parameters[site.name].items():
            assert torch.equal(trained.parameters[site.name][word], held)
