"""An optimizer whose states lie in host memory, and whose step is done there.

The parameters stay where they are. At each step they and their gradients are copied to the host,
moved there, and copied back: the same arithmetic, so that on a CPU it is the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Marks = Callable[[Tensor], Tensor]
"""Takes a tensor that lies in host memory and gives it back, known as such to whoever counts."""
Twins = dict[Tensor, tuple[Tensor, Tensor]]
"""Host tensor -> the parameter that it is a copy of, and where its gradient is copied to."""
_TWINS = "_twins"
"""Attribute of an optimizer that is on the host."""


class Says(Protocol):
    """What a worker does to fit; see `memory.setting.Setting`."""

    @property
    def host_states(self) -> bool:
        """Whether the states lie on the host."""


class HostStates:
    """Moves an optimizer's states to the host and back, between two steps.

    Args:
        optimizer: any; its class, its groups and what it remembers stay as they are, so that a
            checkpoint does not tell where it was made.
        marks: called with every tensor that is made for the host.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, marks: Marks = lambda held: held) -> None:
        self._optimizer = optimizer
        self._marks = marks

    def apply(self, setting: Says) -> None:
        """Have the states where the setting says."""
        if setting.host_states == bool(_twins(self._optimizer)):
            if setting.host_states:
                self._mark()  # what a checkpoint put back
            return
        if setting.host_states:
            self._to_host()
        else:
            self._to_device()

    def _to_host(self) -> None:
        optimizer = self._optimizer
        twins: Twins = {}
        with _disable_current_modes():  # the device's memory is not what is taken here
            for group in optimizer.param_groups:
                for number, parameter in enumerate(group["params"]):
                    host = self._host(parameter.detach()).requires_grad_(True)
                    host.grad = self._host(torch.zeros_like(host))
                    group["params"][number] = host
                    twins[host] = parameter, host.grad
                    _take_over(optimizer, parameter, host, self._host)
        setattr(optimizer, _TWINS, twins)
        for name in ("step", "train", "eval"):  # the last two where it is schedule-free
            if callable(getattr(optimizer, name, None)):
                setattr(optimizer, name, self._on_host(getattr(optimizer, name)))

    def _to_device(self) -> None:
        optimizer, twins = self._optimizer, _twins(self._optimizer)
        for group in optimizer.param_groups:
            for number, host in enumerate(group["params"]):
                parameter, _ = twins[host]
                group["params"][number] = parameter
                _take_over(optimizer, host, parameter, _copier(parameter.device))
        delattr(optimizer, _TWINS)
        for name in ("step", "train", "eval"):
            vars(optimizer).pop(name, None)

    def _host(self, tensor: Tensor) -> Tensor:
        pinned = torch.cuda.is_available()
        made = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return self._marks(made).copy_(tensor)

    def _mark(self) -> None:
        for state in self._optimizer.state.values():
            for held in state.values():
                if isinstance(held, Tensor):
                    self._marks(held)

    def _on_host(self, action: Callable[..., Any]) -> Callable[..., Any]:
        """What an optimizer does with its parameters, done with their copies."""

        def done(*args: Any, **words: Any) -> Any:
            twins = _twins(self._optimizer)
            with _disable_current_modes():
                _fetch(twins)
                given = action(*args, **words)
                self._mark()
            _send(twins)
            return given

        return done


def moved(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that the optimizer moves in the end, wherever it does so."""
    twins = _twins(optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [twins[parameter][0] if parameter in twins else parameter for parameter in held]


def _twins(optimizer: torch.optim.Optimizer) -> Twins:
    twins: Twins = vars(optimizer).get(_TWINS, {})
    return twins


def _take_over(
    optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, copy: Callable[[Tensor], Tensor]
) -> None:
    """What was remembered of one parameter is remembered of another."""
    state = optimizer.state.pop(old, None)
    if state:
        optimizer.state[new] = {
            key: copy(held) if isinstance(held, Tensor) else held for key, held in state.items()
        }


def _copier(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device, copy=True)


@torch.no_grad()
def _fetch(twins: Twins) -> None:
    """Values too: they may have been capped, averaged or read from a checkpoint meanwhile."""
    for host, (parameter, gradient) in twins.items():
        host.copy_(parameter, non_blocking=True)
        if parameter.grad is None:
            host.grad = None
        elif host.grad is not None:  # else this part is left out of the step
            gradient.copy_(parameter.grad, non_blocking=True)
    for device in {parameter.device for parameter, _ in twins.values()}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


@torch.no_grad()
def _send(twins: Twins) -> None:
    for host, (parameter, gradient) in twins.items():
        parameter.copy_(host, non_blocking=True)
        host.grad = gradient  # a part is left out of a step at a time
