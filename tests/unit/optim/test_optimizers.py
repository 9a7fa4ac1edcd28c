"""One step of each optimizer against its paper, and that all of them find the way."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from least_squares import Problem, each
from numpy.typing import NDArray
from torch import nn

from raylora.base.errors import OptionError
from raylora.optim.kinds import KINDS
from raylora.optim.optimizers import (
    OptimizerOptions,
    make_optimizer,
    optimizer_problem,
    optimizer_warning,
    sets_rate,
    wants_shapes,
)

Array = NDArray[np.float64]
STEPS = 5


def walked(options: OptimizerOptions, weight: Array, gradients: Array, rates: list[float]) -> Array:
    """Where an optimizer goes with these gradients and rates, in float64."""
    values = nn.Parameter(torch.from_numpy(weight.copy()))
    values.grad = torch.zeros_like(values)
    optimizer = make_optimizer(
        options, [{"params": [values], "rate": options.rate, "name": "unet"}]
    )
    for gradient, rate in zip(gradients, rates, strict=True):
        if sets_rate(options):
            optimizer.param_groups[0]["lr"] = rate
        values.grad.copy_(torch.from_numpy(gradient))
        optimizer.step()
    return values.detach().numpy()


def problem(*shape: int) -> tuple[Array, Array, list[float]]:
    random = np.random.default_rng(0)
    rates = [3e-3 / t for t in range(1, STEPS + 1)]
    return random.normal(size=shape), random.normal(size=(STEPS, *shape)), rates


def test_adamw_is_the_papers():
    """Loshchilov & Hutter 2019, algorithm 2, in float64; the rate changes from step to step."""
    weight, gradients, rates = problem(30)
    options = OptimizerOptions(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    found = walked(options, weight, gradients, rates)
    mean, variance = np.zeros(30), np.zeros(30)
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        mean = 0.8 * mean + 0.2 * gradient
        variance = 0.95 * variance + 0.05 * gradient**2
        corrected = (mean / (1 - 0.8**t)) / (np.sqrt(variance / (1 - 0.95**t)) + 1e-6)
        weight = weight - rate * (corrected + 0.1 * weight)
    assert found == pytest.approx(weight, rel=1e-12)


def test_lion_is_the_papers():
    """Chen et al. 2023, algorithm 2."""
    weight, gradients, rates = problem(30)
    options = OptimizerOptions(name="lion", betas=(0.8, 0.95), weight_decay=0.1)
    found = walked(options, weight, gradients, rates)
    momentum = np.zeros(30)
    for gradient, rate in zip(gradients, rates, strict=True):
        way = np.sign(0.8 * momentum + 0.2 * gradient)
        momentum = 0.95 * momentum + 0.05 * gradient
        weight = weight - rate * (way + 0.1 * weight)
    assert found == pytest.approx(weight, rel=1e-12)


def test_sgd_with_nesterovs_momentum_is_the_papers():
    """Sutskever et al. 2013, in the form that torch's documentation gives."""
    weight, gradients, rates = problem(30)
    options = OptimizerOptions(name="sgd_nesterov", weight_decay=0.1)
    found = walked(options, weight, gradients, rates)
    velocity = np.zeros(30)
    for gradient, rate in zip(gradients, rates, strict=True):
        pulled = gradient + 0.1 * weight
        velocity = 0.9 * velocity + pulled
        weight = weight - rate * (pulled + 0.9 * velocity)
    assert found == pytest.approx(weight, rel=1e-12)


def adafactor(weight: Array, gradients: Array, rates: list[float], *, scaled: bool) -> Array:
    """Shazeer & Stern 2018, algorithms 4 and 5, for a matrix."""
    rows, columns = np.zeros(weight.shape[0]), np.zeros(weight.shape[1])
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        kept = 1 - t**-0.8
        squared = gradient**2 + 1e-30
        rows = kept * rows + (1 - kept) * squared.mean(axis=1)
        columns = kept * columns + (1 - kept) * squared.mean(axis=0)
        update = gradient / np.sqrt(np.outer(rows, columns) / rows.mean())
        update = update / max(1.0, math.sqrt((update**2).mean()))
        size = max(1e-3, math.sqrt((weight**2).mean())) if scaled else 1.0
        weight = weight - rate * size * update
    return weight


@pytest.mark.slow
def test_adafactor_with_a_given_rate_is_the_papers():
    weight, gradients, rates = problem(6, 4)
    args = {"relative_step": False, "scale_parameter": False}
    found = walked(OptimizerOptions(name="adafactor", args=args), weight, gradients, rates)
    # its state is float32 whatever the weights are
    assert found == pytest.approx(adafactor(weight, gradients, rates, scaled=False), abs=1e-9)


@pytest.mark.slow
def test_adafactor_in_its_relative_form_is_the_papers():
    weight, gradients, _ = problem(6, 4)
    found = walked(OptimizerOptions(name="adafactor"), weight, gradients, [0.0] * STEPS)
    rates = [min(1e-2, 1 / math.sqrt(t)) for t in range(1, STEPS + 1)]
    assert found == pytest.approx(adafactor(weight, gradients, rates, scaled=True), abs=1e-8)


def test_prodigys_estimate_grows_as_in_the_paper():
    """Mishchenko & Defazio 2023, algorithm 4, in float64; d and weights of each step."""
    random = np.random.default_rng(1)
    target, weight = random.normal(size=30), np.zeros(30)
    options = OptimizerOptions(name="prodigy", args={"d_coef": 1.5})
    values = nn.Parameter(torch.zeros(30, dtype=torch.float64))
    optimizer = make_optimizer(options, [{"params": [values], "rate": 1.0, "name": "unet"}])
    beta1, beta2, d0 = 0.9, 0.999, 1e-6
    beta3, d, top = math.sqrt(beta2), d0, 0.0
    start, sums, mean, variance = weight, np.zeros(30), np.zeros(30), np.zeros(30)
    estimates = []
    for _ in range(40):
        values.grad = values.detach() - torch.from_numpy(target)
        optimizer.step()
        gradient = weight - target
        mean = beta1 * mean + (1 - beta1) * d * gradient
        variance = beta2 * variance + (1 - beta2) * (d * gradient) ** 2
        top = beta3 * top + d * d / d0 * float(gradient @ (start - weight))
        sums = beta3 * sums + d * d / d0 * gradient
        used, d = d, max(d, 1.5 * top / float(np.abs(sums).sum()))
        weight = weight - used * mean / (np.sqrt(variance) + d * 1e-8)
        estimates.append(d)
        assert optimizer.param_groups[0]["d"] == pytest.approx(d, rel=1e-9)
    assert values.detach().numpy() == pytest.approx(weight, rel=1e-9)
    assert estimates[-1] > 1e4 * d0


def test_a_schedule_free_step_is_the_papers():
    """Defazio et al. 2024, algorithm 1 for AdamW: z walks, x averages, y is where gradients are."""
    weight, gradients, _ = problem(30)
    options = OptimizerOptions(name="adamw_schedule_free", learning_rate=3e-3)
    found = walked(options, weight, gradients, [3e-3] * STEPS)
    z = x = y = weight
    variance = np.zeros(30)
    for t, gradient in enumerate(gradients, start=1):
        variance = 0.999 * variance + 0.001 * gradient**2
        z = z - 3e-3 * gradient / (np.sqrt(variance / (1 - 0.999**t)) + 1e-8)
        x = (1 - 1 / t) * x + z / t
        y = 0.1 * z + 0.9 * x
    assert found == pytest.approx(y, rel=1e-9)


def rate_for(name: str) -> dict[str, Any]:
    """A rate that gets somewhere in 250 steps, where the job gives one."""
    return {"learning_rate": 3e-2} if not OptimizerOptions(name=name).one_rate else {}


@pytest.mark.parametrize("name", each([*KINDS, "torch.optim:NAdam", "torch.optim:Adagrad"]))
def test_every_optimizer_finds_the_way(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes': nothing is paged on a CPU
        problem = Problem(OptimizerOptions(name=name, **rate_for(name)))
        before = problem.loss()
        problem.move(range(250), lambda step: 1.0)
    assert problem.loss() < 0.5 * before


@pytest.mark.parametrize("name", each(["adamw", "lion", "adamw8bit", "adafactor", "sgd_nesterov"]))
def test_a_rate_of_nothing_moves_nothing(name: str):
    args = {"relative_step": False} if name == "adafactor" else {}
    problem = Problem(OptimizerOptions(name=name, args=args))
    before = problem.values()
    problem.move(range(3), lambda step: 0.0)
    assert all(torch.equal(a, b) for a, b in zip(problem.values(), before, strict=True))


@pytest.mark.slow
def test_eight_bits_hold_the_state_in_a_quarter_of_its_memory():
    counts = {}
    for name in ("adamw", "adamw8bit"):
        options = OptimizerOptions(name=name)
        values = nn.Parameter(torch.zeros(65536))
        values.grad = torch.ones_like(values)
        optimizer = make_optimizer(
            options, [{"params": [values], "rate": options.rate, "name": "unet"}]
        )
        optimizer.step()
        state = optimizer.state[values].values()
        counts[name] = sum(t.nbytes for t in state if isinstance(t, torch.Tensor))
    assert counts["adamw8bit"] < 0.27 * counts["adamw"]


def test_adamw_takes_one_pass():
    optimizer = Problem(OptimizerOptions()).optimizer
    assert all(group["fused"] for group in optimizer.param_groups)


def test_only_those_that_look_at_shapes_are_given_them():
    shaped = [name for name in KINDS if wants_shapes(OptimizerOptions(name=name))]
    assert shaped == ["adafactor"]
    assert wants_shapes(OptimizerOptions(name="torch.optim:NAdam"))


def test_one_flat_tensor_moves_as_its_layers_do():
    """Which lets the adapter hand its buffer over; float64, so that only mistakes differ."""
    for name in ("adamw", "prodigy", "d_adapt_lion", "adamw_schedule_free", "sgd_nesterov"):
        options = OptimizerOptions(name=name)
        start = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        flat = [nn.Parameter(start.clone())]
        leaves = [nn.Parameter(part.clone()) for part in (start[:40].view(8, 5), start[40:])]
        for parameters in (flat, leaves):
            optimizer = make_optimizer(
                options, [{"params": parameters, "rate": options.rate, "name": "unet"}]
            )
            for _ in range(5):
                for parameter in parameters:
                    parameter.grad = parameter.detach() - 1
                optimizer.step()
        joined = torch.cat([leaf.detach().flatten() for leaf in leaves])
        torch.testing.assert_close(flat[0].detach(), joined, rtol=1e-10, atol=0)


@pytest.mark.slow
def test_a_paged_optimizer_is_refused_where_nothing_can_be_paged():
    options = OptimizerOptions(name="paged_adamw32bit")
    assert "on cpu there is nothing to move. Choose adamw." in str(
        optimizer_problem(options, "cpu")
    )
    assert optimizer_problem(options, "cuda") is None
    assert optimizer_problem(OptimizerOptions(name="adamw8bit"), "cpu") is None


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    options = OptimizerOptions(name="prodigy", args={"d_coef": 2})  # read without the package
    told = r'pip install "raylora\[optimizers\]"'
    with pytest.raises(OptionError, match=told):
        make_optimizer(options, [])
    assert "raylora[optimizers]" in str(optimizer_problem(options, "cpu"))


def test_a_value_that_the_class_refuses_is_told_in_one_sentence():
    options = OptimizerOptions(name="prodigy", args={"d0": -1})
    assert "prodigyopt.Prodigy(d0=-1)): Invalid d0 value: -1" in str(
        optimizer_problem(options, "cpu")
    )


def test_a_small_rate_for_an_estimated_one_is_warned_about():
    small = OptimizerOptions(name="prodigy", learning_rate=1e-4)
    assert "1 is usual" in str(optimizer_warning(small))
    assert optimizer_warning(OptimizerOptions(name="prodigy")) is None
    assert optimizer_warning(OptimizerOptions()) is None
