"""DyLoRA: which ranks a sample uses and trains, how strongly, and that it is the sample's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from raylora.adapt.dropout import Dropout
from raylora.base.seeds import sample_number
from raylora.base.site import Site
from raylora.networks import Call
from raylora.networks.dylora import DyloraOptions, network

LINEAR = Site("unet.q", "linear", 6, 5)
CONV = Site("unet.k", "conv", 6, 5, kernel=(3, 3), padding=(1, 1))
RANK, UNIT = 6, 2
SAMPLES = [sample_number(f"{i}.png", 0) for i in range(300)]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def drawn(site: Site = LINEAR, *, seed: int = 0, step: int = 7, rows: int = 300) -> torch.Tensor:
    """First rank of each row's slice."""
    options = DyloraOptions(rank=RANK, unit=UNIT)
    dropped = Dropout(options, seed=seed, unit=network.unit(options))
    dropped.begin(step, SAMPLES)
    assert dropped.gate(site) is None
    part = dropped.part(site)
    assert part is not None
    first, unit = part(RANK, torch.empty(rows, 1))
    assert unit == UNIT
    return first


def test_slices_are_drawn_evenly_and_belong_to_seed_step_sample_and_layer():
    first = drawn()
    assert first.unique().tolist() == [0, 2, 4]
    # 300 draws of a third: a standard deviation of 8
    assert all(65 < int((first == value).sum()) < 135 for value in (0, 2, 4))
    assert torch.equal(drawn(), first)
    for other in (drawn(seed=1), drawn(step=8), drawn(CONV)):
        assert 0.2 < float((other == first).double().mean()) < 0.47
    chunks = drawn(rows=600)
    assert torch.equal(chunks, first.repeat_interleave(2))


def test_all_ranks_are_used_where_nobody_trains():
    dropped = Dropout(DyloraOptions(rank=RANK, unit=UNIT), seed=0, unit=UNIT)
    assert dropped.part(LINEAR) is None
    dropped.begin(0, SAMPLES)
    dropped.end()
    assert dropped.part(LINEAR) is None


@pytest.mark.parametrize("site", [LINEAR, CONV], ids=["linear", "conv"])
def test_a_row_uses_the_ranks_up_to_its_slice_and_trains_the_slice(site: Site):
    size = () if site.kind == "linear" else site.kernel
    down = normal(0, RANK, 6, *size).requires_grad_()
    up = normal(1, 5, RANK).requires_grad_()
    shape, out = ((3, 6), (3, 5)) if site.kind == "linear" else ((6, 4, 4), (5, 4, 4))
    x, base = normal(2, 3, *shape).requires_grad_(), normal(3, 3, *out)
    firsts = [4, 0, 2]

    def part(rank: int, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        assert (rank, len(rows)) == (RANK, 3)
        return torch.tensor(firsts), UNIT

    call = Call(x, base, 0.5, 1.0, site, torch.nn.Identity(), None, part)
    found = network.forward({"down": down, "up": up}, call)
    weigh = normal(4, *found.shape)
    grads = torch.autograd.grad((found * weigh).sum(), [x, down, up])
    expected = [torch.zeros_like(x), torch.zeros_like(down), torch.zeros_like(up)]
    for row, first in enumerate(firsts):
        end = first + UNIT
        # by itself: a plain LoRA cut to its first ranks, of which the slice alone is kept
        plain = Call(x[row : row + 1], base[row : row + 1], 0.5, 1.0, site, torch.nn.Identity())
        cut = {"down": down[:end], "up": up[:, :end]}
        alone = network.forward(cut, plain._replace(strength=(RANK / end) ** 0.5))
        assert_close(found[row], alone[0], rtol=0, atol=1e-12)
        held = torch.autograd.grad((alone[0] * weigh[row]).sum(), [x, down, up])
        expected[0] += held[0]
        expected[1][first:end] += held[1][first:end]
        expected[2][:, first:end] += held[2][:, first:end]
    for ours, theirs in zip(grads, expected, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"rank": 8, "unit": 3}, r"does not divide network\.rank 8. Choose one of 1, 2, 4, 8"),
        ({"rank": 8, "unit": 8}, "which is LoRA"),
        ({"initial": "a.safetensors", "initial_ranks": True}, "has to divide them"),
    ],
    ids=str,
)
def test_wrong_units_are_refused(words: dict[str, Any], sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        DyloraOptions(**words)


def test_a_layer_whose_own_rank_leaves_a_rest_is_named():
    class Own(DyloraOptions):
        def rank_at(self, site: Site) -> int:
            return 5

    assert network.fits(Own(rank=6, unit=2), LINEAR) == (
        "its rank is 5, which network.unit 2 does not divide"
    )
    assert network.fits(DyloraOptions(rank=6, unit=2), LINEAR) is None
