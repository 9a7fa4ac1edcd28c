"""Operations on the meta device: what they give, and what they would have to do.

What an operation gives there depends on the sizes of its arguments alone, and models are made of
equal blocks. So each is run once for the sizes at hand, and made again from what is known of it:
torch takes a millisecond for some that way, and a hundredth of that so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from raylora.memory.emulate import backward_sums


@dataclass(frozen=True)
class Done:
    """What an operation would do.

    Attributes:
        flops: of products, convolutions and attention; 0 for all else.
        attends: it is attention.
        moved: bytes of each tensor that is read or written, where `flops` is 0.
        moment: bytes that it takes while it runs.
    """

    flops: int
    attends: bool
    moved: tuple[int, ...]
    moment: int


@dataclass(frozen=True)
class _New:
    """A tensor that an operation made."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Given:
    """An argument that an operation gave back, by its place among all tensors given."""

    place: int


_known: dict[Any, tuple[Any, Done]] = {}


def run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Done]:
    """The result of an operation on the meta device, and what it would do."""
    look = _look_of(func, args, kwargs)
    if look in _known:
        made, done = _known[look]
        return _again(made, args, kwargs), done
    result = func(*args, **kwargs)
    done = _done(func, args, kwargs, result)
    given = list(tensors_in((*args, *kwargs.values())))
    made = _describe(result, given)
    # What changes a size of its arguments must do so again.
    if made is not NotImplemented and _look_of(func, args, kwargs) == look:
        _known[look] = made, done
    return result, done


def tensors_in(held: Sequence[Any]) -> Iterator[Tensor]:
    """All tensors, also those in lists."""
    for one in held:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, tuple | list):
            yield from tensors_in(one)


def _look_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func, _look(args), tuple(kwargs), _look(tuple(kwargs.values()))


def _look(held: Sequence[Any]) -> tuple[Any, ...]:
    """All that a result can depend on."""
    found: list[Any] = []
    for one in held:
        if isinstance(one, Tensor):
            found += (one.shape, one.stride(), one.dtype, one.device.type)
        elif isinstance(one, tuple | list):
            found.append(_look(one))
        else:
            found += (type(one), one)  # 1 and 1.0 are equal, and give other dtypes
    return tuple(found)


def _describe(result: Any, given: Sequence[Tensor]) -> Any:
    """How to make a result again; NotImplemented where it cannot be."""
    if isinstance(result, tuple | list):
        parts = [_describe(one, given) for one in result]
        return NotImplemented if any(one is NotImplemented for one in parts) else tuple(parts)
    if not isinstance(result, Tensor):
        return result
    for place, one in enumerate(given):
        if result is one:
            return _Given(place)
    storage = result.untyped_storage()
    shared = any(storage._cdata == one.untyped_storage()._cdata for one in given)
    described = _New(tuple(result.shape), result.stride(), result.dtype)
    if (
        shared
        or not result.is_meta
        or _make(described).untyped_storage().nbytes() != (storage.nbytes())
    ):
        return NotImplemented
    return described


def _make(new: _New) -> Tensor:
    return torch.empty_strided(new.shape, new.stride, dtype=new.dtype, device="meta")


def _again(made: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(made, _New):
        return _make(made)
    if isinstance(made, _Given):
        return list(tensors_in((*args, *kwargs.values())))[made.place]
    if isinstance(made, tuple):
        return tuple(_again(one, args, kwargs) for one in made)
    return made


def _done(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Done:
    flops_of = flop_registry.get(func._overloadpacket)
    moment = backward_sums(func, args)
    if flops_of is not None:
        attends = "dot_product" in func._schema.name
        return Done(int(flops_of(*args, **kwargs, out_val=result)), attends, (), moment)
    # What is spread out by strides of 0 is read once.
    moved = (
        min(one.numel() * one.element_size(), one.untyped_storage().nbytes())
        for one in tensors_in((*args, *kwargs.values(), result))
    )
    return Done(0, False, tuple(moved), moment)
