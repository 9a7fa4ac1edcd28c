"""What training leaves out: how much, of whom, and that it belongs to the sample and the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import fresh_adapter
from torch import Tensor
from torch.testing import assert_close

from raylora.adapt.attach import Adapter, Attachment
from raylora.adapt.dropout import Dropout
from raylora.base.seeds import sample_number
from raylora.base.site import Site
from raylora.networks import Call, get_network
from raylora.networks.lora import LoraOptions, forward

LINEAR = Site("unet.q", "linear", 6, 5)
CONV = Site("unet.k", "conv", 6, 5, kernel=(3, 3), padding=(1, 1))
SAMPLES = [sample_number(f"{i}.png", 0) for i in range(40)]


def dropout(*, seed: int = 0, **shares: float) -> Dropout:
    return Dropout(LoraOptions(**shares), seed=seed)


def kept(dropped: Dropout, site: Site, shape: tuple[int, ...], samples: list[int]) -> Tensor:
    """What the hidden is multiplied with."""
    dropped.begin(7, samples)
    gate = dropped.gate(site)
    assert gate is not None
    return gate(torch.ones(len(samples), *shape, dtype=torch.float64))


@pytest.mark.parametrize("site", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_of_numbers_is_zero_and_the_others_make_up_for_it(site: Site, share: float):
    shape = (50, 8) if site.kind == "linear" else (8, 5, 10)
    found = kept(dropout(dropout=share), site, shape, SAMPLES)
    assert found.unique().tolist() == pytest.approx([0.0, 1 / (1 - share)])
    # 16,000 draws: the share is found to a standard error of 0.004
    assert float((found == 0).double().mean()) == pytest.approx(share, abs=0.015)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("site", [LINEAR, CONV], ids=["linear", "conv"])
def test_ranks_are_left_out_for_a_whole_sample(site: Site):
    shape = (50, 64) if site.kind == "linear" else (64, 5, 10)
    found = kept(dropout(rank_dropout=0.25), site, shape, SAMPLES)
    ranks = found.flatten(1, -2)[..., 0, :] if site.kind == "linear" else found[:, :, 0, 0]
    whole = ranks[:, None] if site.kind == "linear" else ranks[:, :, None, None]
    assert torch.equal(found, whole.expand_as(found))
    assert ranks.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float((ranks == 0).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert len({tuple(row.tolist()) for row in ranks}) == len(SAMPLES)


def test_layers_are_left_out_for_a_whole_sample_and_not_made_up_for():
    dropped = dropout(module_dropout=0.3)
    sites = [Site(f"unet.{i}", "linear", 6, 5) for i in range(50)]
    found = torch.stack([kept(dropped, site, (4, 3), SAMPLES)[:, 0, 0] for site in sites])
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert float((found == 0).double().mean()) == pytest.approx(0.3, abs=0.03)
    assert 0 < float((found[:, 0] == 0).double().mean()) < 1, "not all layers of a sample alike"


@pytest.mark.parametrize(
    "shares", [{"dropout": 0.3}, {"rank_dropout": 0.3}, {"module_dropout": 0.3}], ids=str
)
def test_a_samples_mask_does_not_depend_on_its_mates(shares: dict[str, float]):
    shape, dropped = (9, 16), dropout(**shares)
    together = kept(dropped, LINEAR, shape, SAMPLES)
    backwards = kept(dropped, LINEAR, shape, SAMPLES[::-1]).flip(0)
    alone = torch.cat([kept(dropped, LINEAR, shape, [number]) for number in SAMPLES])
    assert torch.equal(together, backwards)
    assert torch.equal(together, alone)


def test_masks_differ_by_seed_step_sample_and_layer():
    shape, masks = (9, 16), []
    for seed, step, site in [(0, 7, LINEAR), (1, 7, LINEAR), (0, 8, LINEAR), (0, 7, CONV)]:
        dropped = dropout(seed=seed, dropout=0.5)
        dropped.begin(step, SAMPLES[:2])
        gate = dropped.gate(Site(site.name, "linear", 6, 5))
        assert gate is not None
        masks += list(gate(torch.ones(2, *shape)))
    for i, first in enumerate(masks):
        for second in masks[:i]:
            agree = float((first == second).double().mean())
            assert 0.25 < agree < 0.75, "unrelated masks of one half agree in half of their places"


def test_chunks_of_one_caption_share_ranks_and_not_numbers():
    dropped = dropout(rank_dropout=0.5)
    dropped.begin(0, SAMPLES[:2])
    gate = dropped.gate(LINEAR)
    assert gate is not None
    ranks = gate(torch.ones(6, 4, 32))  # three chunks a sample
    assert torch.equal(ranks[0], ranks[1])
    assert torch.equal(ranks[0], ranks[2])
    assert not torch.equal(ranks[2], ranks[3])
    dropped = dropout(dropout=0.5)
    dropped.begin(0, SAMPLES[:2])
    gate = dropped.gate(LINEAR)
    assert gate is not None
    numbers = gate(torch.ones(6, 4, 32))
    assert not torch.equal(numbers[0], numbers[1])


@pytest.mark.parametrize("site", [LINEAR, CONV], ids=["linear", "conv"])
def test_the_adapted_output_is_base_plus_scaled_up_of_the_gated_down(site: Site):
    rng = np.random.default_rng(0)
    kernel = () if site.kind == "linear" else site.kernel
    held = {
        "down": torch.from_numpy(rng.normal(size=(4, 6, *kernel))),
        "up": torch.from_numpy(rng.normal(size=(5, 4))),
    }
    dropped = dropout(dropout=0.4, rank_dropout=0.2)
    dropped.begin(0, SAMPLES[:2])
    gate = dropped.gate(site)
    if site.kind == "linear":
        x, base = (torch.from_numpy(rng.normal(size=(2, 3, n))) for n in (6, 5))
        assert gate is not None
        expected = base + 0.5 * gate(x @ held["down"].T) @ held["up"].T
    else:
        x, base = (torch.from_numpy(rng.normal(size=(2, n, 4, 4))) for n in (6, 5))
        assert gate is not None
        hidden = gate(torch.nn.functional.conv2d(x, held["down"], padding=1))
        expected = base + 0.5 * torch.einsum("or,brhw->bohw", held["up"], hidden)
    call = Call(x, base, 0.5, 1.0, site, torch.nn.Identity(), gate)
    assert_close(forward(held, call), expected, rtol=0, atol=1e-12)


def test_dropout_is_only_on_within_dropping():
    model = torch.nn.Module()
    model.q = torch.nn.Linear(6, 5, dtype=torch.float64)
    options = LoraOptions(rank=4, dropout=0.5)
    adapter: Adapter = fresh_adapter(
        get_network("lora"),
        options,
        [LINEAR],
        seed=0,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        adapter.values += 1
    adapter.dropout = Dropout(options, seed=0)
    Attachment(model, "unet", adapter)
    x = torch.ones(2, 3, 6, dtype=torch.float64)
    whole = model.q(x)
    with adapter.dropping(3, SAMPLES[:2]):
        dropped = model.q(x)
        assert torch.equal(model.q(x), dropped), "the same when it is asked again"
    assert not torch.equal(dropped, whole)
    assert torch.equal(model.q(x), whole)


def test_after_the_first_batch_the_masks_of_all_layers_are_made_at_once(
    monkeypatch: pytest.MonkeyPatch,
):
    dropped = dropout(rank_dropout=0.5, module_dropout=0.2)
    sites, made = [Site(f"unet.{i}", "linear", 6, 5) for i in range(5)], []
    plain = Dropout._masks
    monkeypatch.setattr(Dropout, "_masks", lambda *given: made.append(1) or plain(*given))
    for step in range(3):
        dropped.begin(step, SAMPLES[:2])
        gates = [dropped.gate(site) for site in (*sites, *sites)]
        held = [gate(torch.ones(2, 4, 8)) for gate in gates if gate is not None]
        assert all(torch.equal(a, b) for a, b in zip(held[:5], held[5:], strict=True))
    assert len(made) == 5 + 1 + 1


def agreement(first: Tensor, second: Tensor) -> float:
    """Of two masks of one half; unrelated ones agree in half of their places."""
    return float(((first > 0) == (second > 0)).double().mean())


def test_each_layer_leaves_out_other_ranks():
    dropped = dropout(rank_dropout=0.5)
    other = Site("unet.other", "linear", 6, 5)
    first, second = (kept(dropped, site, (1, 64), SAMPLES) for site in (LINEAR, other))
    assert 0.45 < agreement(first, second) < 0.55  # 2,560 places


def test_the_three_kinds_leave_out_independently_of_each_other():
    sites = [Site(f"unet.{i}", "linear", 6, 5) for i in range(60)]
    kinds = ("dropout", "rank_dropout", "module_dropout")
    found = {
        kind: torch.cat([kept(dropout(**{kind: 0.5}), site, (1, 1), SAMPLES) for site in sites])
        for kind in kinds
    }
    for first, second in (kinds[:2], kinds[1:], kinds[::2]):
        assert 0.45 < agreement(found[first], found[second]) < 0.55, (first, second)
    together = torch.cat(
        [kept(dropout(**dict.fromkeys(kinds, 0.5)), site, (1, 1), SAMPLES) for site in sites]
    )
    expected = found["dropout"] * found["rank_dropout"] * found["module_dropout"]
    assert torch.equal(together, expected)
    assert set(together.unique().tolist()) == {0.0, 4.0}
