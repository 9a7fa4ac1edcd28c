"""Packs: rows of captions, checkpointing, and what is refused. That rows are their adapters alone
is tested for every network in contract/."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import fresh_adapter
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from raylora.adapt.attach import Adapter, Attachment
from raylora.adapt.pack import Pack
from raylora.base.site import Site
from raylora.networks import get_network

SITES = [Site("toy.0", "linear", 6, 7), Site("toy.2", "linear", 7, 5)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def adapter(seed: int, kind: str = "lora") -> Adapter:
    network = get_network(kind)
    made = fresh_adapter(
        network,
        network.options(rank=3),
        SITES,
        seed=seed,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        made.values += normal(seed, *made.values.shape)
    return made


@pytest.fixture
def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    return made.requires_grad_(False)


def routed(model: nn.Module, pack: Pack) -> None:
    Attachment(model, "toy", adapter(0)).adapter = pack


def test_a_caption_of_several_chunks_goes_through_its_samples_adapter(model: nn.Module):
    adapters = [adapter(1), adapter(2)]
    routed(model, pack := Pack(adapters))
    chunks = normal(3, 6, 4, 6)  # three chunks a sample
    with pack.rows([1, 0], [0.5, 1.0]):
        found = model(chunks)
        with pytest.raises(AssertionError, match="5 rows for 2 samples"):
            model(chunks[:5])
    with pack.rows([1, 1, 1, 0, 0, 0], [0.5, 0.5, 0.5, 1.0, 1.0, 1.0]):
        assert torch.equal(model(chunks), found)


def test_rows_without_tokens_are_taken(model: nn.Module):
    routed(model, pack := Pack([adapter(1), adapter(2)]))
    vectors = normal(3, 2, 6)
    with pack.rows([1, 0]):
        assert_close(model(vectors), model(vectors[:, None])[:, 0], rtol=0, atol=1e-13)


def test_checkpointing_gives_the_same_gradients(model: nn.Module):
    adapters = [adapter(1), adapter(2)]
    x, found = normal(3, 2, 4, 6).requires_grad_(), []
    for checkpointed in (False, True):
        routed(model, pack := Pack(adapters))
        with pack.rows([1, 0]):
            out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
            out.square().sum().backward()
        found.append(pack.gradients.clone())
    assert found[0].any()
    assert torch.equal(found[0], found[1])


def test_gradients_add_up_over_micro_batches(model: nn.Module):
    routed(model, pack := Pack([adapter(1), adapter(2)]))
    x = normal(3, 4, 4, 6)
    with pack.rows([1, 0, 0, 1]):
        model(x).square().sum().backward()
    whole = pack.gradients.clone()
    pack.gradients.zero_()
    for row, k in enumerate([1, 0, 0, 1]):
        with pack.rows([k]):
            model(x[row : row + 1]).square().sum().backward()
    assert_close(pack.gradients, whole, rtol=1e-12, atol=1e-12)


def test_an_optimizer_over_one_row_moves_that_adapter_alone(model: nn.Module):
    routed(model, pack := Pack([adapter(1), adapter(2)]))
    before = pack.values.detach().clone()
    with pack.rows([0, 1]):
        old = model(x := normal(3, 2, 4, 6)).detach()
        model(x).square().sum().backward()
    one = nn.Parameter(pack.values.data[1])
    one.grad = pack.gradients[1]
    torch.optim.SGD([one], lr=0.1).step()
    assert torch.equal(pack.values[0], before[0])
    assert not torch.equal(pack.values[1], before[1])
    with pack.rows([0, 1]):
        new = model(x)
    assert torch.equal(new[0], old[0])
    assert not torch.allclose(new[1], old[1])


def test_wrong_rows_are_a_mistake_of_the_program():
    pack = Pack([adapter(1)])
    with pytest.raises(AssertionError, match="no such adapter"), pack.rows([1]):
        pass
    with pytest.raises(AssertionError, match="2 strengths for 1 samples"), pack.rows([0], [1, 1]):
        pass
