"""The flat buffer, and layers whose output passes through whichever adapter is set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import fresh_adapter
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.adapt.attach import Adapter, Attachment
from raylora.base.site import Site
from raylora.networks.lora import LoraOptions, network

CPU = torch.device("cpu")
SITES = [Site("toy.first", "linear", 4, 3), Site("toy.inner.second", "linear", 3, 2)]
OPTIONS = LoraOptions(rank=2, alpha=1.0)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3).double()
        self.inner = nn.ModuleDict({"second": nn.Linear(3, 2).double()})
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["second"](self.first(x))


def no_weight() -> np.ndarray:
    raise AssertionError("plain LoRA does not ask for it")


def adapter(seed: int = 0, sites: list[Site] = SITES) -> Adapter:
    made = fresh_adapter(network, OPTIONS, sites, seed=seed, dtype=torch.float64, device=CPU)
    with torch.no_grad():
        made.values += torch.from_numpy(np.random.default_rng(seed).normal(size=len(made.values)))
    return made


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)


def test_parameters_and_gradients_are_views_of_the_flat_buffers(x: Tensor):
    made = adapter()
    assert made.values.shape == made.gradients.shape == (2 * 4 + 3 * 2 + 2 * 3 + 2 * 2,)
    assert made.values.grad is made.gradients
    Attachment(model := Toy(), "toy", made)
    model(x).sum().backward()
    joined = [leaf.grad.flatten() for held in made.parameters.values() for leaf in held.values()]
    assert torch.equal(torch.cat(joined), made.gradients)
    assert made.gradients.abs().max() > 0
    made.values.data.fill_(7.0)
    assert all((leaf == 7).all() for held in made.parameters.values() for leaf in held.values())


def test_an_optimizer_over_the_flat_values_moves_the_layers(x: Tensor):
    made = adapter()
    Attachment(model := Toy(), "toy", made)
    before = model(x).detach()
    model(x).square().sum().backward()
    torch.optim.SGD([made.values], lr=0.1).step()
    assert not torch.allclose(model(x), before)


def test_gradients_add_up_over_micro_batches(x: Tensor):
    made = adapter()
    Attachment(model := Toy(), "toy", made)
    model(x).sum().backward()
    whole = made.gradients.clone()
    made.gradients.zero_()
    for row in x:
        model(row[None]).sum().backward()
    assert_close(made.gradients, whole, rtol=0, atol=1e-14)


def test_strength_multiplies_what_the_adapter_adds(x: Tensor):
    sites = SITES[1:]
    made = adapter(sites=sites)
    attachment = Attachment(model := Toy(), "toy", made)
    full = model(x)
    made.strength = 0.5
    half = model(x)
    attachment.adapter = None
    base = model(x)
    assert_close(half - base, (full - base) / 2, rtol=0, atol=1e-15)


def test_adapters_are_exchanged_at_any_time(x: Tensor):
    first, second = adapter(1), adapter(2, SITES[:1])
    attachment = Attachment(model := Toy(), "toy")
    base = model(x)
    attachment.attach(SITES)
    assert torch.equal(model(x), base)
    attachment.adapter = first
    with_first = model(x)
    attachment.adapter = second
    with_second = model(x)
    attachment.adapter = first
    assert torch.equal(model(x), with_first)
    assert not torch.allclose(with_first, with_second)
    assert not torch.allclose(with_second, base)


def test_a_site_is_routed_once(x: Tensor):
    made = adapter()
    attachment = Attachment(model := Toy(), "toy", made)
    once = model(x)
    attachment.attach(SITES)
    assert torch.equal(model(x), once)
    attachment.detach()
    attachment.detach()
    assert "forward" not in vars(model.first)


def test_exported_tensors_are_detached_and_of_this_moment():
    made = adapter()
    exported = made.modules()
    assert list(exported) == [site.name for site in SITES]
    down = exported["toy.first"]["lora_down.weight"]
    assert not down.requires_grad
    assert torch.equal(down, made.parameters["toy.first"]["down"])


def test_groups_are_pieces_of_the_buffer_in_the_order_that_was_asked():
    first, second = (site.name for site in SITES)
    initial = {
        site.name: network.initial(OPTIONS, site, lambda shape: np.ones(shape), no_weight)
        for site in SITES
    }
    halves = [[(second, "up"), (first, "up")], [(first, "down"), (second, "down")]]
    made = Adapter(
        network,
        SITES,
        initial,
        {site.name: 1.0 for site in SITES},
        dtype=torch.float64,
        device=CPU,
        groups=halves,
    )
    assert [made.values[piece].numel() for piece in made.groups] == [2 * 2 + 3 * 2, 2 * 4 + 2 * 3]
    ups, downs = made.flat(0), made.flat(1)
    with torch.no_grad():
        ups.fill_(3.0)
        downs.fill_(5.0)
    for site in (first, second):
        assert (made.parameters[site]["up"] == 3).all()
        assert (made.parameters[site]["down"] == 5).all()
    made.gradients.copy_(torch.arange(len(made.gradients)))
    assert ups.grad is not None
    assert torch.equal(ups.grad, made.gradients[made.groups[0]])
    leaves = made.leaves(0)
    assert [leaf.shape for leaf in leaves] == [(2, 2), (3, 2)]
    assert all(leaf.grad is not None for leaf in leaves)
    assert torch.equal(torch.cat([leaf.grad.flatten() for leaf in leaves]), ups.grad)  # type: ignore[union-attr]


def test_off_is_the_base_and_ends_with_an_error_too(x: Tensor):
    made = adapter()
    model = Toy()
    model.load_state_dict((plain := Toy()).state_dict())
    Attachment(model, "toy", made)
    made.strength = 0.5
    changed = model(x)
    try:
        with made.off():
            assert torch.equal(model(x), plain(x))
            raise KeyError
    except KeyError:
        pass
    assert made.strength == 0.5
    assert torch.equal(model(x), changed)


def test_an_attachment_takes_the_layers_of_its_model_alone(x: Tensor):
    other = [Site("encoder.first", "linear", 4, 3), Site("encoder.inner.second", "linear", 3, 2)]
    made = adapter(sites=[*SITES, *other])
    first, second = Toy(), Toy()
    before = second(x)
    Attachment(first, "toy", made)
    Attachment(second, "encoder", made)
    with torch.no_grad():
        for site in other:
            made.parameters[site.name]["up"].zero_()
    assert torch.equal(second(x), before)
    first(x).sum().backward()
    assert made.parameters["toy.first"]["up"].grad.any()  # type: ignore[union-attr]
    assert not made.parameters["encoder.first"]["up"].grad.any()  # type: ignore[union-attr]


def test_constants_have_a_buffer_of_their_own_and_no_gradient(x: Tensor):
    initial = {
        site.name: network.initial(OPTIONS, site, lambda shape: np.ones(shape), no_weight)
        for site in SITES
    }
    frozen = {site.name: frozenset({"down"}) for site in SITES}
    made = Adapter(
        network,
        SITES,
        initial,
        {site.name: 1.0 for site in SITES},
        dtype=torch.float64,
        device=CPU,
        constants=frozen,
    )
    assert (len(made.values), len(made.constants)) == (3 * 2 + 2 * 2, 2 * 4 + 2 * 3)
    assert not made.constants.requires_grad
    made.constants.fill_(7.0)
    for site in SITES:
        assert (made.parameters[site.name]["down"] == 7).all()
        assert made.parameters[site.name]["down"].grad is None
    assert all(leaf.requires_grad for leaf in made.leaves(0))
    assert len(made.leaves(0)) == 2
    Attachment(model := Toy(), "toy", made)
    model(x).sum().backward()
    assert made.gradients.any()
    assert (made.constants == 7).all()


def test_a_norm_is_routed_as_any_layer_of_one_tensor():
    site = Site("toy.norm", "norm", 4, 4, role="norm")
    model = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    seen = []

    class Looks:
        sites = [site]  # noqa: RUF012

        def adapted(self, at: Site, layer: nn.Module, x: Tensor, base_output: Tensor) -> Tensor:
            seen.append((at, layer))
            return 2 * base_output

    x = torch.randn(2, 4)
    before = model["norm"](x)
    Attachment(model, "toy", Looks())
    assert torch.equal(model["norm"](x), 2 * before)
    assert seen == [(site, model["norm"])]
