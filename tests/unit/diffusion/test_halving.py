"""Halving a batch that does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raylora.diffusion.halving import in_halves


@pytest.mark.parametrize(("fits", "tried"), [(7, [7]), (3, [7, 3, 4, 2, 2]), (1, None)])
def test_a_batch_is_halved_until_it_fits_and_keeps_its_order(fits: int, tried: list[int] | None):
    seen: list[int] = []

    def double(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        if len(batch) > fits:
            raise torch.OutOfMemoryError("a test's")
        return 2 * batch

    batch = torch.arange(14.0).reshape(7, 2)
    assert torch.equal(in_halves(double, batch), 2 * batch)
    assert tried is None or seen == tried


def test_one_sample_that_does_not_fit_is_an_error():
    def nothing_fits(batch: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("a test's")

    with pytest.raises(torch.OutOfMemoryError):
        in_halves(nothing_fits, torch.zeros(3, 1))
