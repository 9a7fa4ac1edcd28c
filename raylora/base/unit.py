"""A stretch of a model that is moved to the device, or computed again, as one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Unit:
    """One block of a model.

    Attributes:
        name: its path with the component, e.g. `transformer.single_transformer_blocks.0`.
        module: whose forward pass is the unit's, and whose weights move with it.
        mlp: the feed-forward parts within it, for whoever computes only these again; may be empty.
    """

    name: str
    module: nn.Module
    mlp: tuple[nn.Module, ...] = ()
