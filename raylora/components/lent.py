"""Models that are on the device while they are computed with: who brings them, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

Load = Callable[[torch.device], nn.Module]
"""Gives a model, frozen and whole, with its weights on a device."""


class Lender(Protocol):
    """Brings a model to the device for those who compute with it."""

    @property
    def device(self) -> torch.device:
        """Where lent models take and give their tensors, wherever their weights lie."""

    def lend(
        self, component: str, load: Load, *, work_bytes: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """Within it, the model can be called. Whoever is lent it keeps no reference to it.

        Args:
            component: names it; asked for again, `load` gives the same.
            work_bytes: what calling it takes beside its weights, about.
        """

    def aside(self, tensor: Tensor) -> Tensor:
        """The same numbers on the host, for later."""

    def clear(self) -> None:
        """Nobody needs what was lent for a while."""


class Keeps:
    """Loads a model when it is first asked for, and keeps it.

    Args:
        held: models that are there already.
    """

    def __init__(self, device: torch.device, held: Mapping[str, nn.Module] | None = None) -> None:
        self.device = device
        self._held = dict(held or {})

    @contextmanager
    def lend(self, component: str, load: Load, *, work_bytes: int = 0) -> Iterator[nn.Module]:
        """The one model that there is of the name."""
        if component not in self._held:
            self._held[component] = load(self.device)
        yield self._held[component]

    def aside(self, tensor: Tensor) -> Tensor:
        """On the CPU."""
        return tensor.cpu()

    def clear(self) -> None:
        """They stay."""
