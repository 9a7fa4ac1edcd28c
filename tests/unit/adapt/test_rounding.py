"""How far rounding moves a layer: a bound that holds, and that is no excuse for other numbers."""

from __future__ import annotations

import pytest
import torch
from test_kinds import FILES, draw
from torch import Tensor

from raylora.adapt import kinds
from raylora.adapt.lora_file import AdapterModule
from raylora.adapt.rounding import merged_bound

EXACT = ("alpha", "dora_scale", "rescale")


def stored(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """As a file holds them."""
    return {
        word: tensor.to(torch.float32 if word in EXACT else dtype)
        for word, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("called", FILES)
def test_what_rounding_moves_is_within_the_bound_and_what_is_wrong_is_not(
    called: str, dtype: torch.dtype
) -> None:
    shape, tensors = FILES[called]
    weight = draw(*shape, seed=9, size=1.0).double()
    generator = torch.Generator().manual_seed(3)
    exact = {  # digits that float16 does not have
        word: tensor.double() if word in EXACT else tensor.double()
        + 1e-4 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for word, tensor in tensors.items()
    }  # fmt: skip
    held = stored(exact, dtype)
    wanted, found = (kinds.merged(one, {"weight": weight})["weight"] for one in (exact, held))
    module = AdapterModule("a", held)
    bound = merged_bound(module, weight)
    assert (found - wanted).norm() <= bound
    # Not so wide that a strength off by a tenth would fit: half precision has 3 digits.
    if dtype != torch.bfloat16:
        assert bound < 0.1 * (wanted - weight).norm()


def test_numbers_below_the_smallest_of_float16_are_allowed_for() -> None:
    down, up = draw(2, 5, size=1e-8).double(), draw(3, 2, size=1.0).double()
    exact = {kinds.DOWN: down, kinds.UP: up}
    held = stored(exact, torch.float16)
    assert not held[kinds.DOWN].any()
    weight = torch.zeros(3, 5, dtype=torch.float64)
    moved = kinds.change(exact)["weight"].norm()
    assert 0 < moved <= merged_bound(AdapterModule("a", held), weight)
