"""Compiling the units of a model: one graph for all that are alike, and one more a bucket.

Only passes that train are compiled. What people look at (previews, held-out losses, the file's
first look) runs as it is, with whatever strength and adapter, and compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from raylora.base.unit import Unit

MOST_GRAPHS = 512
"""Of one kind of unit: its widths times the buckets. Torch's own limit of 8 is for programs that
change their shapes without end; beyond it units would silently run as they are."""


def compile_units(units: Sequence[Unit], *, backend: str = "inductor") -> None:
    """Have each unit's training pass compiled when it first runs.

    Call it before anything is routed around the units (`Placed`), so that what is computed again is
    the compiled pass. The adapter may come later.

    Args:
        backend: of `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, MOST_GRAPHS
    )
    for unit in units:
        _compile(unit.module, backend)


def _compile(module: nn.Module, backend: str) -> None:
    plain = module.forward
    compiled: Callable[..., Any] = torch.compile(plain, dynamic=False, backend=backend)

    def forward(*inputs: Any, **words: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*inputs, **words)

    module.forward = forward
