"""All that a run carries from one step to the next, out of its parts and back."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from raylora.adapt.attach import Adapter
from raylora.optim.state import flatten, restore
from raylora.training.checkpoint import State
from raylora.training.parts import Parts

_OPTIMIZER = "optimizer/"


def held_state(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) as a checkpoint holds them; the tensors are the run's own."""
    tensors, facts = flatten(parts.mover.optimizer)
    held = {f"{_OPTIMIZER}{name}": tensor for name, tensor in tensors.items()}
    held["values"] = parts.adapter.values.detach()
    if parts.adapter.constants.numel():
        held["constants"] = parts.adapter.constants
    if parts.ema:
        held["ema"] = parts.ema.average
    return held, {"optimizer": facts, "loss_scale": parts.loss_scale.facts()}


@torch.no_grad()
def restore_state(parts: Parts, state: State) -> None:
    """Put a checkpoint's state back, bit for bit."""
    restore_adapter(parts.adapter, state)
    if parts.ema:
        parts.ema.average.copy_(state.tensors["ema"])
    restore_optimizer(parts.mover.optimizer, state)
    parts.loss_scale.restore(state.facts["loss_scale"])


@torch.no_grad()
def restore_adapter(adapter: Adapter, state: State, *, values: str = "values") -> None:
    """Put the adapter's numbers back.

    Args:
        values: which of the state's tensors the trained ones are: these, or their average `ema`.
    """
    adapter.values.copy_(state.tensors[values])
    if adapter.constants.numel():
        # They are not drawn again: what a decomposition gives differs by machine.
        adapter.constants.copy_(state.tensors["constants"])


def copy_state_from_first(parts: Parts) -> None:
    """Give every worker the first one's state, with what an optimizer holds as plain numbers."""
    group, (tensors, facts) = parts.group, held_state(parts)
    for tensor in tensors.values():
        group.copy_from_first(tensor)
    text = bytearray(json.dumps(facts).encode())
    length = int(group.gather([float(len(text))])[0][0])
    told = torch.frombuffer(text.ljust(length)[:length], dtype=torch.uint8)
    group.copy_from_first(told)
    restore_state(parts, State(0, tensors, json.loads(told.numpy().tobytes())))


def restore_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Put the optimizer's part of it back."""
    tensors = {
        name.removeprefix(_OPTIMIZER): tensor
        for name, tensor in state.tensors.items()
        if name.startswith(_OPTIMIZER)
    }
    restore(optimizer, tensors, state.facts["optimizer"])
