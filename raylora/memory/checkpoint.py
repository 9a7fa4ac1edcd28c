"""Computing again in the backward pass what was not kept, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from raylora.base.unit import Unit
from raylora.memory.setting import Checkpointing

MakeContext = Callable[[], AbstractContextManager[Any]]
_around: list[MakeContext] = []


def again(function: Callable[..., Any], *inputs: Any, **words: Any) -> Any:
    """What a function gives, keeping only what it was given; the backward pass calls it again.

    Nothing in it may draw random numbers of torch's.
    """
    if not torch.is_grad_enabled():
        return function(*inputs, **words)
    names, given = list(words), len(inputs)

    # Only positional tensors are kept as autograd keeps them, so that hooks see them and they go
    # once they were used.
    def call(*every: Any) -> Any:
        return function(*every[:given], **dict(zip(names, every[given:], strict=True)))

    return checkpoint(
        call,
        *inputs,
        *words.values(),
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=_contexts,
    )


@contextmanager
def recomputing_in(make: MakeContext) -> Iterator[None]:
    """What is kept by `again` within it is computed again within `make()`.

    Dispatch modes are of a thread, and the backward pass may run in another.
    """
    _around.append(make)
    try:
        yield
    finally:
        _around.remove(make)


def recomputed_units(units: Sequence[Unit], checkpointing: Checkpointing) -> tuple[int, ...]:
    """Which units are computed again as a whole.

    `alternate` is every second unit of each kind: where kinds take turns, as in UNets, every second
    of all would be all of one kind.
    """
    if checkpointing == "all":
        return tuple(range(len(units)))
    if checkpointing != "alternate":
        return ()
    seen: dict[type, int] = {}
    found = []
    for number, unit in enumerate(units):
        kind = type(unit.module)
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] % 2:
            found.append(number)
    return tuple(found)


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), _around[-1]() if _around else nullcontext()
