"""What optimizers remember is as large as the planner is told, and 8 bits are an eighth of it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from least_squares import each
from torch import Tensor, nn

from raylora.base.errors import OptionError
from raylora.optim.kinds import KINDS
from raylora.optim.optimizers import OptimizerOptions, make_optimizer
from raylora.optim.states import eight_bit_twin, state_bytes, states_problem, with_eight_bits

SHAPE = (16, 1024)


def remembered(options: OptimizerOptions) -> float:
    """Bytes a number of all tensors, by storage, that a real optimizer holds after two steps."""
    one = nn.Parameter(torch.from_numpy(np.random.default_rng(0).normal(size=SHAPE)).float())
    optimizer = make_optimizer(options, [{"params": [one], "rate": options.rate, "name": "one"}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes': nothing is paged on a CPU
        for _ in range(2):
            one.grad = torch.ones_like(one)
            optimizer.step()
    held: dict[int, int] = {}
    for state in optimizer.state.values():
        for word, value in state.items():
            if isinstance(value, Tensor) and "qmap" not in word:  # one for all parameters
                held[value.data_ptr()] = value.untyped_storage().nbytes()
    return sum(held.values()) / one.numel()


@pytest.mark.parametrize("name", each(KINDS))
def test_what_the_planner_is_told_is_what_an_optimizer_holds(name: str):
    options = OptimizerOptions(name=name)
    # adafactor's rows and columns, and numbers that all parameters have one of
    assert state_bytes(options) == pytest.approx(remembered(options), rel=0.03)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("adamw", {"amsgrad": True}),
        ("prodigy", {"slice_p": 16}),
        ("torch.optim:SGD", {}),
        ("torch.optim:SGD", {"momentum": 0.9}),
        ("torch.optim:NAdam", {}),
    ],
)
def test_arguments_and_other_classes_are_counted(name: str, args: dict[str, Any]):
    options = OptimizerOptions(name=name, args=args)
    assert state_bytes(options) == pytest.approx(remembered(options), rel=0.01, abs=0.01)


def test_a_class_that_cannot_be_tried_is_taken_for_adam():
    assert state_bytes(OptimizerOptions(name="torch.optim:SparseAdam")) == 8.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_the_twin_does_the_same_in_a_quarter_of_the_bytes(name: str):
    pytest.importorskip("bitsandbytes")
    own = OptimizerOptions(name=name, weight_decay=0.02)
    twin = with_eight_bits(own)
    assert twin.name == eight_bit_twin(name)
    assert twin.rate == own.rate
    assert state_bytes(twin) == pytest.approx(state_bytes(own) / 4, rel=0.02)
    ends = []
    for options in (own, twin):
        draw = np.random.default_rng(0)
        one = nn.Parameter(torch.from_numpy(draw.normal(size=SHAPE)).float())
        start = one.detach().clone()
        groups: list[Any] = [{"params": [one], "rate": options.rate, "name": "one"}]
        optimizer = make_optimizer(options, groups)
        for _ in range(5):
            one.grad = torch.from_numpy(draw.normal(size=SHAPE)).float()
            optimizer.step()
        ends.append(one.detach() - start)
    # 8 bits of a running mean: some signs and sizes differ, the way is the same
    assert torch.nn.functional.cosine_similarity(*(end.flatten() for end in ends), dim=0) > 0.97


def test_only_what_has_a_twin_is_mapped_and_the_rest_is_told():
    assert eight_bit_twin("sgd_nesterov") is None  # bitsandbytes' is another method
    assert states_problem(OptimizerOptions(name="prodigy"), "full") is None
    assert states_problem(OptimizerOptions(name="prodigy"), "auto") is None
    assert states_problem(OptimizerOptions(), "8bit") is None
    told = states_problem(OptimizerOptions(name="prodigy"), "8bit")
    assert told is not None
    assert "prodigy has no form with states in 8 bits. Choose one of adamw, lion" in told
    told = states_problem(OptimizerOptions(name="lion8bit"), "8bit")
    assert told is not None
    assert "keeps its states in 8 bits already" in told
    with pytest.raises(OptionError, match=r"args are adamw's own \(amsgrad\)"):
        with_eight_bits(OptimizerOptions(args={"amsgrad": True}))
