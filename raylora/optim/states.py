"""How much an optimizer remembers, and which of them remembers the same in 8 bits."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import torch
from torch import Tensor, nn

from raylora.base.errors import OptionError
from raylora.optim.kinds import KINDS
from raylora.optim.optimizers import make_optimizer
from raylora.optim.options import ADAFACTOR_FLAGS, OptimizerOptions

_TWINS = {"adamw": "adamw8bit", "lion": "lion8bit"}
_USUAL = (16, 1024)
"""The layer that states are measured on: a half of rank 16."""


def eight_bit_twin(name: str) -> str | None:
    """The optimizer that does the same with its states in 8 bits; None where there is none."""
    return _TWINS.get(name)


def with_eight_bits(options: OptimizerOptions) -> OptimizerOptions:
    """The options with which `memory.states: 8bit` moves the adapter.

    The job keeps the word that was written; this is what the optimizer is made from.

    Raises:
        OptionError: there is no such optimizer, or it lacks an argument of the job's.
    """
    twin = eight_bit_twin(options.name)
    if twin is None:
        raise OptionError(_no_twin(options.name))
    if options.args:
        raise OptionError(
            f"memory.states is 8bit, by which optimizer.name {options.name} becomes {twin}, and "
            f"optimizer.args are {options.name}'s own ({', '.join(options.args)}). Leave them out, "
            f"or set optimizer.name: {twin} with arguments of its own."
        )
    return options.model_copy(update={"name": twin})


def states_problem(options: OptimizerOptions, states: str) -> str | None:
    """Why `memory.states` does not go with the optimizer; None if it does."""
    if states != "8bit":
        return None
    try:
        with_eight_bits(options)
    except OptionError as error:
        return str(error)
    return None


def _no_twin(name: str) -> str:
    if "8bit" in name:
        return (
            f"memory.states is 8bit, and optimizer.name {name} keeps its states in 8 bits already. "
            "Leave memory.states out."
        )
    return (
        f"memory.states is 8bit, and optimizer.name {name} has no form with states in 8 bits. "
        f"Choose one of {', '.join(_TWINS)}, or leave memory.states out."
    )


def state_bytes(options: OptimizerOptions) -> float:
    """Bytes that the optimizer remembers for each trained number.

    Known for each by its name; with arguments of the job's, and for classes of other packages, it
    is made and counted where its package is there.
    """
    known = KINDS.get(options.name)
    if known is not None and options.args.keys() <= ADAFACTOR_FLAGS:  # which add no state
        return known.state_bytes
    try:
        return _counted(options)
    # Whatever a class cannot do with a matrix is told elsewhere (`optimizer_problem`).
    except (OptionError, ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError):
        return options.kind.state_bytes


def _counted(options: OptimizerOptions) -> float:
    one = nn.Parameter(torch.ones(_USUAL))
    one.grad = torch.ones_like(one)
    optimizer = make_optimizer(options, [{"params": [one], "rate": options.rate, "name": "one"}])
    with redirect_stdout(io.StringIO()):
        optimizer.step()
    held: dict[int, int] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            # Maps of what 8 bits mean are shared by all parameters.
            if isinstance(value, Tensor) and not key.startswith("qmap"):
                held[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(held.values()) / one.numel()
