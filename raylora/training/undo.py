"""Going back to before a move: an optimizer that runs out of memory may have moved half."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raylora.base.errors import MemoryPlanError
from raylora.memory.host import as_host
from raylora.memory.probe import free_host_bytes
from raylora.optim.state import is_memory
from raylora.training.host_watch import MARGIN_BYTES
from raylora.training.parts import Parts


@contextmanager
def undone_without_memory(parts: Parts) -> Iterator[None]:
    """Within it, running out of memory leaves adapter, gradients and optimizer as they were.

    They are copied beforehand, where that much of the device was seen to be free, as it is once the
    activations are gone. Elsewhere a GPU is asked first for what a move takes, and a CPU that plays
    one copies to the host.

    Raises:
        MemoryPlanError: memory ran out, and there was no room for copies.
    """
    if _takes_nothing(parts):
        yield
        return
    before = _Before(parts)
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not before.restore():
            raise MemoryPlanError(
                "Out of memory while the adapter was moved, and there was no room to keep what it "
                "was before. The same command goes on from the newest checkpoint; set "
                "memory.states: 8bit under another `name`, or memory.host_states: true, to need "
                "less there."
            ) from error
        raise


def _takes_nothing(parts: Parts) -> bool:
    """Whether the move asks the device for no memory: it was done while the gradients came, or the
    host does it."""
    if parts.mover.cap or parts.ema:
        return False
    return parts.fused.moved_all if parts.fused else parts.fitting.setting.host_states


class _Before:
    """All that a move changes, as it is now."""

    def __init__(self, parts: Parts) -> None:
        optimizer = self._optimizer = parts.mover.optimizer
        self._states = {one: _same(held) for one, held in optimizer.state.items()}
        self._groups = [
            {word: _same(held) for word, held in group.items() if word != "params"}
            for group in optimizer.param_groups
        ]
        self._own = {word: held for word, held in vars(optimizer).items() if is_memory(word, held)}
        self._scale, self._scale_facts = parts.loss_scale, parts.loss_scale.facts()
        changing = [
            *(parts.adapter.values.detach(), parts.adapter.gradients),
            *([parts.ema.average] if parts.ema else []),
            *_tensors([self._states, self._groups, self._own]),
        ]
        self._changing = list({id(tensor): tensor.detach() for tensor in changing}.values())
        copy = _copier(parts.device, self._changing)
        self._copies = None if copy is None else [copy(tensor) for tensor in self._changing]

    @torch.no_grad()
    def restore(self) -> bool:
        """Have it so again, in the tensors that there were; takes no memory. False: no copies."""
        if self._copies is None:
            return False
        state = self._optimizer.state
        for one in [one for one in state if one not in self._states]:
            del state[one]
        for one, held in self._states.items():
            state[one] = held
        for group, held in zip(self._optimizer.param_groups, self._groups, strict=True):
            group |= held
        vars(self._optimizer).update(self._own)
        self._scale.restore(self._scale_facts)
        for tensor, copied in zip(self._changing, self._copies, strict=True):
            tensor.copy_(copied)
        return True


def _same(value: Any) -> Any:
    """The same things in containers of their own."""
    if isinstance(value, dict):
        return {key: _same(held) for key, held in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_same(held) for held in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for held in value.values() if isinstance(value, dict) else value:
            yield from _tensors(held)


def _copier(device: torch.device, tensors: Sequence[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """What copies them to where there is room; None where there is none."""
    wanted = sum(tensor.nbytes for tensor in tensors)
    if device.type == "cuda":
        free = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        if wanted <= min(free, torch.cuda.mem_get_info(device)[0]):
            return lambda tensor: tensor.clone()
        # Copies that cross to the host would take longer than a small model's step. What a move
        # takes is about one more tensor, and is asked for before anything has moved.
        torch.empty_like(tensors[0])
        return None
    if wanted + MARGIN_BYTES > free_host_bytes():
        return None
    return _on_host


def _on_host(tensor: Tensor) -> Tensor:
    # Not page-locked: it is seldom needed, and such memory is scarce.
    return as_host(torch.empty(tensor.shape, dtype=tensor.dtype)).copy_(tensor)
