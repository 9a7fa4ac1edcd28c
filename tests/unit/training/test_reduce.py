"""The group's calls: alone, and as real processes."""

from __future__ import annotations

import pytest
import torch
from children import together

from raylora.training.reduce import Alone, Distributed


def call_everything(rank: int) -> tuple[list[float], list[list[float]], list[float], torch.dtype]:
    group = Distributed()
    assert (group.rank, group.size) == (rank, 2)
    summed = torch.tensor([1.0 + rank, 1e-17], dtype=torch.float64)
    group.add_up(summed)
    gathered = group.gather([float(rank), 1 / 3])
    copied = torch.full((3,), float(rank), dtype=torch.float64)
    group.copy_from_first(copied)
    counter = torch.tensor(rank + 5)  # as the optimizer's step, a 0-d tensor
    group.copy_from_first(counter)
    group.barrier()
    return summed.tolist(), gathered, [*copied.tolist(), float(counter)], summed.dtype


@pytest.mark.slow
def test_processes_sum_gather_and_copy():
    first, second = together(2, call_everything)
    assert first == second
    assert first == (
        [3.0, 2e-17],
        [[0.0, 1 / 3], [1.0, 1 / 3]],
        [0.0, 0.0, 0.0, 5.0],
        torch.float64,
    )


def test_alone_is_a_fleet_of_one():
    group = Alone()
    tensor = torch.tensor([1.0, 2.0])
    group.add_up(tensor)
    group.copy_from_first(tensor)
    group.barrier()
    assert tensor.tolist() == [1.0, 2.0]
    assert group.gather([1.5]) == [[1.5]]
    assert (group.rank, group.size) == (0, 1)
