"""The cap of each layer's change of weight, against the rule written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raylora.adapt.attach import Adapter
from raylora.adapt.norm_cap import NormCap
from raylora.base.site import Site
from raylora.networks import get_network

SITES = [
    Site("unet.q", "linear", 7, 5),
    Site("unet.k", "conv", 6, 4, kernel=(3, 3), padding=(1, 1)),
    Site("unet.small", "linear", 7, 5),
    Site("unet.fresh", "linear", 7, 5),
]


def adapter() -> Adapter:
    rng = np.random.default_rng(0)
    sizes = [1.0, 1.0, 0.05, 0.0]
    initial = {
        site.name: {
            "down": rng.normal(
                size=(3, site.inputs, *(site.kernel if site.kind == "conv" else ()))
            ),
            "up": size * rng.normal(size=(site.outputs, 3)),
        }
        for site, size in zip(SITES, sizes, strict=True)
    }
    scales = {"unet.q": 0.5, "unet.k": 2.0, "unet.small": 1.0, "unet.fresh": 1.0}
    return Adapter(
        get_network("lora"),
        SITES,
        initial,
        scales,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )


def norms(held: Adapter) -> dict[str, float]:
    return {
        site.name: float(
            held.scales[site.name]
            * (
                held.parameters[site.name]["up"].detach()
                @ held.parameters[site.name]["down"].detach().flatten(1)
            ).norm()
        )
        for site in SITES
    }


def test_large_layers_come_down_to_the_cap_by_equal_factors_and_small_ones_stay():
    held = adapter()
    before, values = norms(held), held.values.detach().clone()
    told = NormCap(held, 2.0).apply()
    after = norms(held)
    assert before["unet.q"] > 2 < before["unet.k"]
    assert 0 < before["unet.small"] < 1
    assert after["unet.q"] == pytest.approx(2.0, rel=1e-12)
    assert after["unet.k"] == pytest.approx(2.0, rel=1e-12)
    assert after["unet.small"] == before["unet.small"] < 2
    assert after["unet.fresh"] == 0
    first = adapter()
    for word in ("down", "up"):
        factor = (2.0 / before["unet.q"]) ** 0.5
        expected = first.parameters["unet.q"][word].detach() * factor
        torch.testing.assert_close(held.parameters["unet.q"][word].detach(), expected)
    assert int(told["capped_layers"]) == 2
    assert float(told["largest_norm"]) == pytest.approx(2.0)
    assert float(told["mean_norm"]) == pytest.approx((2 + 2 + before["unet.small"]) / 4)
    assert not torch.equal(values, held.values)


def test_it_reaches_the_flat_buffer_and_a_second_time_changes_nothing():
    held = adapter()
    cap = NormCap(held, 2.0)
    cap.apply()
    values = held.values.detach().clone()
    cap.apply()
    torch.testing.assert_close(held.values.detach(), values, rtol=1e-14, atol=0)


def test_a_frozen_half_stays_and_the_other_takes_all():
    network = get_network("lora")
    initial = {"unet.q": {"down": np.ones((3, 7)), "up": np.ones((5, 3))}}
    held = Adapter(
        network,
        SITES[:1],
        initial,
        {"unet.q": 0.5},
        dtype=torch.float64,
        device=torch.device("cpu"),
        constants={"unet.q": frozenset({"down"})},
    )
    told = NormCap(held, 2.0).apply()
    # every number of up down is 3: ΔW measures 0.5 * 3 * sqrt(35)
    factor = 2.0 / (0.5 * 3 * 35**0.5)
    assert (held.parameters["unet.q"]["down"] == 1).all()
    expected = torch.full((5, 3), factor).double()
    torch.testing.assert_close(held.parameters["unet.q"]["up"].detach(), expected)
    assert float(told["largest_norm"]) == pytest.approx(2.0)
