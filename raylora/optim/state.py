"""All that an optimizer remembers, as tensors and plain facts: stored and put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raylora.base.errors import TrainingError
from raylora.optim.host_states import moved

_FROM_THE_JOB = {"params", "lr", "initial_lr", "betas", "eps", "weight_decay", "name"}
"""Entries of a group that the job gives; a job that goes on with others is to get them."""


def flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything the optimizer remembers.

    Returns:
        Tensors by name, of any dtype, those that it holds itself (copy them before the next step),
        and facts that JSON can hold. Without pickle, so a checkpoint runs no code.

    Raises:
        TrainingError: it remembers something that cannot be stored so.
    """
    packer = _Packer(_class_name(optimizer))
    members = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(key) not in members for key in optimizer.state):
        raise TrainingError(
            f"{packer.owner} remembers things that belong to no parameter, which cannot be stored. "
            "Choose another optimizer.name."
        )
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        entries = {
            key: packer.pack(value, f"group.{index}.{key}")
            for key, value in group.items()
            if key not in _FROM_THE_JOB
        }
        states = [
            {
                key: packer.pack(value, f"{index}.{number}.{key}", parameter)
                for key, value in optimizer.state.get(parameter, {}).items()
            }
            for number, parameter in enumerate(group["params"])
        ]
        groups.append({"entries": entries, "states": states})
    attributes = {
        key: packer.pack(value, f"attribute.{key}")
        for key, value in vars(optimizer).items()
        if is_memory(key, value)
    }
    return packer.tensors, {"class": packer.owner, "groups": groups, "attributes": attributes}


def restore(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Put back what `flatten` gave, into an optimizer made from the same options.

    Raises:
        TrainingError: it was another optimizer, or one over other parameters.
    """
    owner = _class_name(optimizer)
    if facts["class"] != owner:
        raise TrainingError(
            f"The checkpoint's optimizer is {facts['class']}, and the job's is {owner}. Set "
            "optimizer.name back, or choose another `name` for the run."
        )
    saved = facts["groups"]
    if [len(one["states"]) for one in saved] != [len(g["params"]) for g in optimizer.param_groups]:
        raise TrainingError(
            "The checkpoint's groups of parameters are not those of the job: its rates, blocks or "
            "LoRA+ were others. Set them back, or choose another `name` for the run."
        )
    unpacker = _Unpacker(tensors)
    with torch.no_grad():
        for index, (group, one) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            for key, packed in one["entries"].items():
                group[key] = unpacker.unpack(packed, device)
            for number, (parameter, state) in enumerate(
                zip(group["params"], one["states"], strict=True)
            ):
                held = {
                    key: unpacker.unpack(packed, _device_of(key, group, parameter))
                    for key, packed in state.items()
                }
                if held:
                    _put(optimizer, (index, number), parameter, held)
    for key, packed in facts["attributes"].items():
        setattr(optimizer, key, unpacker.unpack(packed, torch.device("cpu")))


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What the optimizer remembers of its parameters, as far as it is tensors."""
    states = optimizer.state.values()
    return [held for state in states for held in state.values() if isinstance(held, Tensor)]


@contextmanager
def shown_values(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it, the parameters of a schedule-free optimizer hold its average, as people get it.

    Afterwards they are bit for bit what they were: the library's own way back rounds. Others are
    left alone.
    """
    train, evaluate = getattr(optimizer, "train", None), getattr(optimizer, "eval", None)
    if not callable(train) or not callable(evaluate):
        yield
        return
    parameters = moved(optimizer)
    before = [parameter.detach().clone() for parameter in parameters]
    evaluate()
    try:
        yield
    finally:
        train()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def is_memory(key: str, value: object) -> bool:
    """Whether an attribute of the optimizer's own may change from step to step."""
    if key.startswith("_") or key in ("defaults", "state", "param_groups"):
        return False
    return isinstance(value, bool | int | float | str | Tensor | None)


def _device_of(key: str, group: Mapping[str, Any], parameter: Tensor) -> torch.device:
    # torch counts steps on the host, unless it moves everything in one kernel.
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return torch.device("cpu")
    return parameter.device


def _put(
    optimizer: torch.optim.Optimizer,
    place: tuple[int, int],
    parameter: Tensor,
    held: dict[str, Any],
) -> None:
    """Make it a parameter's state; buffers that bitsandbytes makes itself are filled in place."""
    state = optimizer.state[parameter]
    if hasattr(optimizer, "init_state"):  # such buffers may be paged, or shared by parameters
        optimizer.init_state(optimizer.param_groups[place[0]], parameter, *place)
    for key, value in held.items():
        there = state.get(key)
        if isinstance(there, Tensor) and isinstance(value, Tensor) and there.shape == value.shape:
            if there.dtype != value.dtype:
                state[key] = value
            else:
                there.copy_(value)
        else:
            state[key] = value


class _Packer:
    """Values as JSON can hold them; tensors beside, each once though many hold it."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def pack(self, value: Any, path: str, parameter: Tensor | None = None) -> dict[str, Any]:
        if isinstance(value, Tensor):
            if getattr(value, "is_paged", False):
                torch.cuda.synchronize()  # it is read from the host, and may still be written
            return {"tensor": self._name(value, path)}
        if value is None or isinstance(value, bool | str):
            return {"value": value}
        if isinstance(value, int):
            return {"value": int(value)}
        if isinstance(value, float):
            return {"float": float(value).hex()}  # exact, and JSON has no infinity
        if type(value) in (list, tuple, torch.Size):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self.pack(v, f"{path}.{i}") for i, v in enumerate(value)]}
        if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
            return {"dict": [[k, self.pack(v, f"{path}.{k}")] for k, v in value.items()]}
        raise TrainingError(
            f"{self.owner} remembers {path}, a {type(value).__qualname__}, which cannot be stored. "
            "Choose another optimizer.name."
        )

    def _name(self, tensor: Tensor, path: str) -> str:
        place = tensor.data_ptr() or id(tensor)
        key = (place, tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
        name = self._names.setdefault(key, path)
        self.tensors[name] = tensor.detach()
        return name


class _Unpacker:
    """The way back; a tensor that many held is one again."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[tuple[str, torch.device], Tensor] = {}

    def unpack(self, packed: Mapping[str, Any], device: torch.device) -> Any:
        ((kind, value),) = packed.items()
        if kind == "tensor":
            key = (value, device)
            if key not in self._made:
                self._made[key] = self._tensors[value].detach().to(device, copy=True)
            return self._made[key]
        if kind == "float":
            return float.fromhex(value)
        if kind in ("list", "tuple"):
            items = [self.unpack(one, device) for one in _sequence(value)]
            return items if kind == "list" else tuple(items)
        if kind == "dict":
            return {key: self.unpack(one, device) for key, one in _sequence(value)}
        return value


def _sequence(value: Any) -> Sequence[Any]:
    assert isinstance(value, list | tuple)
    return value
