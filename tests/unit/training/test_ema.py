"""The average of the weights: its formula, and that showing it leaves training alone."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from raylora.training.ema import Ema, EmaOptions


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_that_of_the_formula(decay: float, place: Literal["device", "host"]):
    rng = np.random.default_rng(0)
    walk = rng.normal(size=(60, 5)).cumsum(0)
    values = torch.from_numpy(walk[0].copy())
    ema = Ema(EmaOptions(decay=decay, place=place), values)
    expected = walk[0]
    for done in range(1, 60):
        values.copy_(torch.from_numpy(walk[done]))
        ema.update(done)
        kept = min(decay, (1 + done) / (10 + done))
        expected = kept * expected + (1 - kept) * walk[done]
    np.testing.assert_allclose(ema.average.numpy(), expected, rtol=0, atol=1e-12)


def test_while_it_is_shown_the_values_are_the_average_and_then_themselves_bit_for_bit():
    values = torch.tensor([1.0, 2.0])
    ema = Ema(EmaOptions(decay=0.9), values)
    values.copy_(torch.tensor([3.0, 5.0]))
    ema.update(1)
    try:
        with ema.shown():
            assert torch.equal(values, ema.average)
            assert not torch.equal(values, torch.tensor([3.0, 5.0]))
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(values, torch.tensor([3.0, 5.0]))
