"""The sum over workers. A fleet of one is a fleet: same calls, no communication."""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """The workers of a run, as one of them sees it. Every call is made by all of them."""

    rank: int
    size: int

    def add_up(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over workers; the same bits on each."""

    def gather(self, numbers: list[float]) -> list[list[float]]:
        """Every worker's numbers (as many from each), by rank."""

    def copy_from_first(self, tensor: Tensor) -> None:
        """Replace the tensor by worker 0's."""

    def barrier(self) -> None:
        """Wait for everybody."""


def gather_plain(group: Group, value: Any) -> list[Any]:
    """Every worker's value, by rank; plain data, as JSON holds it, of any length."""
    text = json.dumps(value).encode()
    longest = int(max(row[0] for row in group.gather([float(len(text))])))
    padded = text.ljust(longest)
    rows = group.gather([float(byte) for byte in padded])
    return [json.loads(bytes(int(byte) for byte in row)) for row in rows]


class Alone:
    """The only worker."""

    rank = 0
    size = 1

    def add_up(self, tensor: Tensor) -> None:
        """Nothing to add."""

    def gather(self, numbers: list[float]) -> list[list[float]]:
        """Just these."""
        return [numbers]

    def copy_from_first(self, tensor: Tensor) -> None:
        """It is worker 0's."""

    def barrier(self) -> None:
        """Nobody to wait for."""


class Distributed:
    """A torch.distributed process group that somebody else started (Ray Train, or a test)."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        # gloo sums in host memory: gradients of a LoRA are a few MB, so the copy is cheap.
        self._on_host = torch.distributed.get_backend() == "gloo"

    def add_up(self, tensor: Tensor) -> None:
        """One all-reduce, in the tensor's own dtype."""
        held = tensor.cpu() if self._on_host else tensor
        torch.distributed.all_reduce(held)
        if held is not tensor:
            tensor.copy_(held)

    def gather(self, numbers: list[float]) -> list[list[float]]:
        """Through one sum, each worker filling its own row; float64."""
        device = "cpu" if self._on_host else "cuda"
        rows = torch.zeros(self.size, len(numbers), dtype=torch.float64, device=device)
        rows[self.rank] = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(rows)
        return [[float(number) for number in row] for row in rows.tolist()]

    def copy_from_first(self, tensor: Tensor) -> None:
        """One broadcast."""
        # Some state stays on the host, as steps that are counted, and nccl takes none from there.
        held = tensor.to("cpu" if self._on_host else "cuda")
        torch.distributed.broadcast(held, src=0)
        if held is not tensor:
            tensor.copy_(held)

    def barrier(self) -> None:
        """As an empty sum, which both gloo and nccl do without knowing the device."""
        self.gather([0.0])
