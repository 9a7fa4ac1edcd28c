"""All that a run carries from one step to the next, out of its parts and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raylora.optim.state import flatten, restore
from raylora.training.checkpoint import State
from raylora.training.parts import Parts

_OPTIMIZER = "optimizer/"


def held_state(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) as a checkpoint holds them; the tensors are the run's own."""
    tensors, facts = flatten(parts.mover.optimizer)
    held = {f"{_OPTIMIZER}{name}": tensor for name, tensor in tensors.items()}
    held["values"] = parts.adapter.values.detach()
    if parts.ema:
        held["ema"] = parts.ema.average
    return held, {"optimizer": facts, "loss_scale": parts.loss_scale.facts()}


@torch.no_grad()
def restore_state(parts: Parts, state: State) -> None:
    """Put a checkpoint's state back, bit for bit."""
    parts.adapter.values.copy_(state.tensors["values"])
    if parts.ema:
        parts.ema.average.copy_(state.tensors["ema"])
    restore_optimizer(parts.mover.optimizer, state)
    parts.loss_scale.restore(state.facts["loss_scale"])


def restore_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Put the optimizer's part of it back."""
    tensors = {
        name.removeprefix(_OPTIMIZER): tensor
        for name, tensor in state.tensors.items()
        if name.startswith(_OPTIMIZER)
    }
    restore(optimizer, tensors, state.facts["optimizer"])
