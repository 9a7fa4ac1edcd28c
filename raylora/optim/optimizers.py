"""Optimizers, made from their options."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from raylora.base.errors import OptionError
from raylora.optim.foreign import argument_problem
from raylora.optim.kinds import load_optimizer
from raylora.optim.options import OptimizerOptions, taken_words

__all__ = [
    "OptimizerOptions",
    "TensorGroup",
    "make_optimizer",
    "optimizer_problem",
    "optimizer_warning",
    "sets_rate",
    "wants_shapes",
]


class TensorGroup(TypedDict):
    """What one group of the optimizer moves.

    Attributes:
        params: leaves, their gradients in `.grad`.
        rate: peak rate; its sign is the caller's business.
        name: of the group.
    """

    params: Sequence[Tensor]
    rate: float
    name: str


def wants_shapes(options: OptimizerOptions) -> bool:
    """Whether it must be given each layer's tensors; else one flat tensor a group is faster."""
    return options.kind.shapes


def sets_rate(options: OptimizerOptions) -> bool:
    """Whether raylora sets `lr` on every step; else the optimizer's own must be left alone."""
    return not options.own_rate


def make_optimizer(
    options: OptimizerOptions, groups: Sequence[TensorGroup]
) -> torch.optim.Optimizer:
    """The optimizer over groups of tensors, each with its rate.

    Raises:
        OptionError: its package is not installed, or its class refuses an argument.
    """
    cls = load_optimizer(options.kind)
    problem = argument_problem(cls, options.args, taken_words(options), "optimizer.args")
    if problem:
        raise OptionError(problem)
    rates: dict[str, Any] = {"lr": abs(options.rate)} if sets_rate(options) else {}
    held: list[dict[str, Any]] = [
        {
            "params": list(group["params"]),
            "name": group["name"],
            **({"lr": abs(group["rate"])} if rates else {}),
        }
        for group in groups
    ]
    made = _made(options, cls, held, rates)
    if options.schedule_free:
        made.train()  # type: ignore[attr-defined]
    return made


def _made(
    options: OptimizerOptions,
    cls: type[torch.optim.Optimizer],
    groups: list[dict[str, Any]],
    rates: dict[str, Any],
) -> torch.optim.Optimizer:
    try:
        with redirect_stdout(io.StringIO()):  # some print their options
            return cls(groups, **rates, **options.arguments)
    # Classes refuse values in any of these ways, and the values are the job's.
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        told = " ".join(str(error).split()) or "without saying why"
        raise OptionError(
            f"optimizer.name is {options.name}, whose class refuses what it is given "
            f"({options.spelled}): {told}"
        ) from error


def optimizer_problem(options: OptimizerOptions, device_type: str) -> str | None:
    """Why this optimizer cannot train on a device of that type ("cpu", "cuda"); None if it can."""
    kind = options.kind
    package = kind.target.partition(":")[0].partition(".")[0]
    if find_spec(package) is None:
        return (
            f"optimizer.name is {options.name}, which needs the package {package}. "
            f'pip install "raylora[{kind.extra}]", or choose optimizer.name: adamw.'
        )
    if kind.paged and device_type != "cuda":
        return (
            f"optimizer.name is {options.name}, which moves its state between the GPU's and the "
            f"host's memory; on {device_type} there is nothing to move. Choose "
            f"{options.name.removeprefix('paged_').replace('adamw32bit', 'adamw')}."
        )
    # Two axes, since some move matrices only.
    one = nn.Parameter(torch.zeros(2, 2))
    try:
        made = make_optimizer(options, [{"params": [one], "rate": options.rate, "name": "one"}])
    except OptionError as error:
        return str(error)
    return None if package == "bitsandbytes" else _step_problem(options, made, one)


def _step_problem(
    options: OptimizerOptions, made: torch.optim.Optimizer, one: nn.Parameter
) -> str | None:
    """Why it cannot make a step, which some classes say no sooner."""
    one.grad = torch.ones_like(one)
    try:
        with redirect_stdout(io.StringIO()):
            made.step()
    # What a class does with values that it took unseen is its own, and the values are the job's.
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        told = " ".join(str(error).split()).rstrip(".") or "without saying why"
        return (
            f"optimizer.name is {options.name} ({options.spelled}), whose class cannot make a "
            f"step: {told}. Change optimizer.args, or choose another."
        )
    return None


def optimizer_warning(options: OptimizerOptions) -> str | None:
    """What is allowed and seldom meant; None if there is nothing."""
    if options.estimates_rate and options.rate <= 0.1:
        return (
            f"optimizer.learning_rate is {options.rate:g}, and {options.name} multiplies it with "
            "the rate that it estimates; 1 is usual."
        )
    return None
