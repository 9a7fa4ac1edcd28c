"""Every network, found by listing: what the trainer, the pack, the file and the preview rely on.

What they do on a whole model, and through files, is in test_networks_in_models.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from adapters import fresh_adapter
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.testing import assert_close

from raylora.adapt.attach import Adapter, Attachment
from raylora.adapt.dropout import Dropout
from raylora.adapt.pack import Pack
from raylora.base.errors import OptionError
from raylora.base.lookup import plugins
from raylora.base.seeds import sample_number
from raylora.base.site import Site
from raylora.networks import Call, Gate, Network, NetworkOptions, get_network

KINDS = plugins("raylora.networks")
CPU = torch.device("cpu")
SITES = [
    Site("toy.tokens", "linear", 6, 8),
    Site("toy.pixels", "conv", 6, 4),
    Site("toy.kernel", "conv", 6, 4, kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    Site("toy.layer_norm", "norm", 6, 6, role="norm"),
    Site("toy.group_norm", "norm", 6, 6, role="norm"),
]
SAMPLES = [sample_number(f"{i}.png", 0) for i in range(40)]
ROUNDING = 1e-11  # float64 in another order
DROPS = ("dropout", "rank_dropout", "module_dropout")


@dataclass(frozen=True)
class Case:
    """A network with options of it."""

    kind: str
    given: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.kind, *(f"{word}={value}" for word, value in self.given.items())])

    @property
    def network(self) -> Network:
        return get_network(self.kind)

    def options(self, **more: Any) -> NetworkOptions:
        """Small, and with a strength that is not 1."""
        return self.network.options(**{"rank": 2, "alpha": 3.0, **self.given, **more})

    @property
    def sites(self) -> list[Site]:
        options = self.options()
        return [site for site in SITES if self.network.fits(options, site) is None]


VARIANTS = [
    Case("lora", {"scaling": "sqrt_rank"}),
    Case("lora", {"freeze_down": True}),
    Case("lora", {"start": "pissa"}),
    Case("locon", {"tucker": True}),
    Case("locon", {"tucker": True, "freeze_down": True}),
    Case("locon", {"start": "pissa", "conv_rank": 3, "conv_alpha": 1.5}),
    Case("dylora", {"rank": 4, "unit": 2}),
]
CASES = [*(Case(kind) for kind in KINDS), *VARIANTS]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_site = pytest.mark.parametrize(
    ("case", "site"),
    [pytest.param(case, site, id=f"{case}-{site.name}") for case in CASES for site in case.sites],
)
LOW_RANK = [case for case in CASES if case.network.low_rank]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


class Toy(nn.Module):
    """Layers of every kind, with and without a bias; one convolution halves."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.tokens = nn.Linear(6, 8, dtype=dtype)
        self.pixels = nn.Conv2d(6, 4, 1, bias=False, dtype=dtype)
        self.kernel = nn.Conv2d(6, 4, 3, stride=2, padding=1, dtype=dtype)
        self.layer_norm = nn.LayerNorm(6, dtype=dtype)
        self.group_norm = nn.GroupNorm(2, 6, dtype=dtype)
        with torch.no_grad():
            for seed, weight in enumerate(self.parameters()):
                weight.copy_(normal(seed, *weight.shape, dtype=dtype))
        self.requires_grad_(False)

    def forward(self, tokens: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        of_pixels = (self.pixels(pixels), self.kernel(pixels), self.group_norm(pixels))
        return (self.tokens(tokens), self.layer_norm(tokens), *of_pixels)


def inputs(dtype: torch.dtype = torch.float64, *, rows: int = 2) -> tuple[Tensor, Tensor]:
    return normal(10, rows, 3, 6, dtype=dtype), normal(11, rows, 6, 4, 2, dtype=dtype)


def adapter_for(
    case: Case,
    dtype: torch.dtype = torch.float64,
    *,
    sites: list[Site] | None = None,
    seed: int = 0,
    **more: Any,
) -> Adapter:
    return fresh_adapter(
        case.network,
        case.options(**more),
        case.sites if sites is None else sites,
        seed=seed,
        dtype=dtype,
        device=CPU,
        models={"toy": Toy()},
    )


def moved(adapter: Adapter, size: float = 0.3, seed: int = 5) -> Adapter:
    """The adapter as if it had been trained: every number moved."""
    with torch.no_grad():
        adapter.values += size * normal(seed, *adapter.values.shape, dtype=adapter.values.dtype)
    return adapter


def layer_of(site: Site, dtype: torch.dtype = torch.float64) -> nn.Module:
    return Toy(dtype).get_submodule(site.name.removeprefix("toy."))


def call_of(site: Site, dtype: torch.dtype = torch.float64, *, rows: int = 2, **more: Any) -> Call:
    """A call of the frozen layer, at a scale and a strength that are not 1."""
    layer = layer_of(site, dtype)
    tokens, pixels = inputs(dtype, rows=rows)
    x = tokens if site.kind == "linear" or site.name == "toy.layer_norm" else pixels
    return Call(x, layer(x), 1.5, 1.0, site, layer)._replace(**more)


def held_by(layer: nn.Module) -> dict[str, Tensor]:
    return {word: weight.detach().double() for word, weight in layer.named_parameters()}


def trained(adapter: Adapter, site: Site) -> dict[str, Tensor]:
    held = adapter.parameters[site.name]
    return {word: leaf for word, leaf in held.items() if leaf.requires_grad}


@every_kind
def test_its_file_name_is_its_word_and_its_class_says_what_it_is(kind: str):
    options = get_network(kind).options
    assert options().kind == kind
    assert options.__doc__
    assert issubclass(options, NetworkOptions)


@every_case
def test_it_sits_on_linear_layers_and_says_why_where_it_does_not_sit(case: Case):
    assert any(site.kind == "linear" for site in case.sites)
    for site in SITES:
        reason = case.network.fits(case.options(), site)
        assert (reason is None) == (site in case.sites)
        assert reason is None or len(reason.split()) > 2


@every_case
def test_a_fresh_adapter_changes_nothing(case: Case):
    model = Toy()
    before = model(*inputs())
    Attachment(model, "toy", adapter_for(case))
    same = [
        torch.allclose(after, held, rtol=0, atol=1e-6)
        for after, held in zip(model(*inputs()), before, strict=True)
    ]
    assert all(same) != case.network.start_changes


@every_case
def test_the_base_comes_back(case: Case):
    model = Toy()
    before = model(*inputs())
    adapter = moved(adapter_for(case))
    attachment = Attachment(model, "toy", adapter)
    changed = model(*inputs())
    differ = [not torch.allclose(a, b) for a, b in zip(changed, before, strict=True)]
    assert sum(differ) == len(case.sites)
    adapter.strength = 0.0
    assert all(map(torch.equal, model(*inputs()), before))
    adapter.strength = 1.0
    assert all(map(torch.equal, model(*inputs()), changed))
    with adapter.off():
        assert all(map(torch.equal, model(*inputs()), before))
    assert all(map(torch.equal, model(*inputs()), changed))
    attachment.adapter = None
    assert all(map(torch.equal, model(*inputs()), before))
    attachment.adapter = adapter
    attachment.detach()
    assert all(map(torch.equal, model(*inputs()), before))


@every_case
def test_first_weights_come_from_the_seed_and_the_layers_name(case: Case):
    site = case.sites[0]
    first, again, other = (
        moved_words(adapter_for(case, seed=seed), site.name) for seed in (3, 3, 4)
    )
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[word], again[word]) for word in first)
    more = adapter_for(case, sites=[*case.sites[1:], site], seed=3)
    assert all(
        torch.equal(first[word], held) for word, held in moved_words(more, site.name).items()
    )
    drawn = [word for word in first if not torch.equal(first[word], other[word])]
    if case.given.get("start") == "pissa":
        for word in first:  # of the weight and not of chance, to the precision of the search
            assert_close(first[word], other[word], rtol=0, atol=1e-6)
        return
    for word in drawn:
        renamed = replace(site, name="toy.tokens_again")
        assert not torch.equal(initial_of(case, renamed, 3)[word], first[word])


def moved_words(adapter: Adapter, name: str) -> dict[str, Tensor]:
    return {word: leaf.detach().clone() for word, leaf in adapter.parameters[name].items()}


def initial_of(case: Case, site: Site, seed: int) -> dict[str, Tensor]:
    model = Toy()
    model.tokens_again = model.tokens
    adapter = fresh_adapter(
        case.network,
        case.options(),
        [site],
        seed=seed,
        dtype=torch.float64,
        device=CPU,
        models={"toy": model},
    )
    return moved_words(adapter, site.name)


@every_site
def test_merged_is_applied(case: Case, site: Site):
    adapter, call = moved(adapter_for(case)), call_of(site)
    applied = case.network.forward(adapter.parameters[site.name], call)
    assert (applied - call.base_output).abs().max() > 0.01
    held = held_by(call.layer)
    merged = case.network.merged(adapter.parameters[site.name], site, 1.5, held)
    assert merged.keys() <= {"weight", "bias"}
    assert {tensor.dtype for tensor in merged.values()} == {torch.float64}
    expected = functional_call(call.layer, {**held, **merged}, call.x)
    assert_close(applied, expected, rtol=0, atol=ROUNDING)


@every_site
def test_strength_is_how_much_of_the_change_is_added(case: Case, site: Site):
    held, call = moved(adapter_for(case)).parameters[site.name], call_of(site)
    whole = case.network.forward(held, call) - call.base_output
    for strength in (0.0, 0.25, 2.0, -1.0):
        found = case.network.forward(held, call._replace(strength=strength))
        expected = call.base_output + strength * whole
        assert_close(found, expected, rtol=0, atol=ROUNDING)


@every_site
def test_its_gradients_are_those_of_its_merged_weights(case: Case, site: Site):
    adapter, call = moved(adapter_for(case)), call_of(site)
    words, held = list(trained(adapter, site)), held_by(call.layer)
    parameters = dict(adapter.parameters[site.name])
    x = call.x.requires_grad_()
    wanted = [x, *(parameters[word] for word in words)]

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((output * normal(30, *output.shape)).sum(), wanted)

    applied = case.network.forward(parameters, call._replace(x=x, base_output=call.layer(x)))
    merged = case.network.merged(parameters, site, 1.5, held)
    expected = functional_call(call.layer, {**held, **merged}, x)
    for word, ours, theirs in zip(
        ["x", *words], gradients(applied), gradients(expected), strict=True
    ):
        assert ours.abs().max() > 0, word
        assert_close(
            ours, theirs, rtol=1e-10, atol=ROUNDING, msg=lambda text, w=word: f"{w}: {text}"
        )


@every_site
def test_pure_is_forward_and_can_be_batched(case: Case, site: Site):
    network, call = case.network, call_of(site)
    held = moved(adapter_for(case)).parameters[site.name]
    expected = network.forward(held, call)
    assert_close(network.pure(held, call), expected, rtol=0, atol=ROUNDING)
    other = moved(adapter_for(case), seed=6).parameters[site.name]
    stacked = {word: torch.stack([held[word], other[word]]).detach() for word in held}
    scales, strengths = torch.tensor([1.5, 0.5]).double(), torch.tensor([1.0, 0.7]).double()

    def one(
        held: dict[str, Tensor], x: Tensor, base: Tensor, scale: Tensor, much: Tensor
    ) -> Tensor:
        return network.pure(held, Call(x[None], base[None], scale, much, site, call.layer))[0]

    batched = vmap(one)(stacked, call.x, call.base_output, scales, strengths)
    for row, parameters in enumerate((held, other)):
        alone = call._replace(
            x=call.x[row : row + 1],
            base_output=call.base_output[row : row + 1],
            scale=float(scales[row]),
            strength=float(strengths[row]),
        )
        expected = network.forward(parameters, alone)[0]
        assert_close(batched[row], expected, rtol=0, atol=ROUNDING)


@every_site
def test_its_forward_changes_nothing_that_it_is_given(case: Case, site: Site):
    adapter, call = moved(adapter_for(case)), call_of(site)
    given = [call.x, call.base_output, adapter.values.detach(), adapter.constants]
    given += [weight.detach() for weight in call.layer.parameters()]
    before = [tensor.clone() for tensor in given]
    first = case.network.forward(adapter.parameters[site.name], call)
    assert torch.equal(case.network.forward(adapter.parameters[site.name], call), first)
    assert all(map(torch.equal, given, before))
    assert adapter.gradients.count_nonzero() == 0


@every_site
def test_a_samples_output_does_not_depend_on_its_mates(case: Case, site: Site):
    adapter, call = moved(adapter_for(case)), call_of(site)
    together = case.network.forward(adapter.parameters[site.name], call)
    for i in range(len(call.x)):
        row = slice(i, i + 1)
        alone = call._replace(x=call.x[row], base_output=call.base_output[row])
        found = case.network.forward(adapter.parameters[site.name], alone)
        assert_close(found[0], together[i], rtol=0, atol=ROUNDING)


@every_site
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_stay_so_and_finite(case: Case, site: Site, dtype: torch.dtype):
    adapter = moved(adapter_for(case, torch.float32))
    call = call_of(site, dtype)
    held, x = adapter.parameters[site.name], call.x.detach().requires_grad_()
    adapted = case.network.forward(held, call._replace(x=x))
    assert (adapted.dtype, adapted.shape) == (dtype, call.base_output.shape)
    layer = layer_of(site, dtype).float()  # the same weights
    exact_x = call.x.detach().float()
    exact = case.network.forward(
        held, call._replace(x=exact_x, base_output=layer(exact_x), layer=layer)
    )
    # bf16 has 8 bits of mantissa; sums of up to 54 numbers around 1
    assert_close(adapted.float(), exact, rtol=3e-2, atol=0.2)
    adapted.sum().backward()
    assert x.grad is None or x.grad.dtype == dtype
    assert torch.isfinite(adapter.gradients).all()
    assert adapter.gradients.dtype == torch.float32
    for word, leaf in trained(adapter, site).items():
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0, word


@every_case
def test_gradient_reaches_all_that_is_trained_and_nothing_else(case: Case):
    adapter = moved(adapter_for(case))
    Attachment(model := Toy(), "toy", adapter)
    constants = adapter.constants.clone()
    weighted = [(out * normal(i, *out.shape)).sum() for i, out in enumerate(model(*inputs()))]
    sum(weighted[1:], weighted[0]).backward()
    for site in case.sites:
        frozen = case.network.constants(case.options(), site)
        for word, leaf in adapter.parameters[site.name].items():
            if word in frozen:
                assert not leaf.requires_grad
                assert leaf.grad is None
                continue
            assert leaf.grad is not None
            assert leaf.grad.abs().max() > 0, f"{site.name} {word}"
    assert adapter.values.grad is adapter.gradients
    held = sum(leaf.numel() for one in adapter.parameters.values() for leaf in one.values())
    assert len(adapter.values) + len(adapter.constants) == held
    assert torch.equal(adapter.constants, constants)
    assert all(weight.grad is None for weight in model.parameters())


@every_case
def test_fast_words_are_trained_ones(case: Case):
    adapter = adapter_for(case)
    every = {word for site in case.sites for word in trained(adapter, site)}
    assert set(case.network.fast) <= every


@every_case
def test_the_file_words_hold_every_site_and_are_finite(case: Case):
    adapter = moved(adapter_for(case, torch.float32))
    exported = adapter.modules()
    assert list(exported) == [site.name for site in case.sites]
    for tensors in exported.values():
        assert tensors
        for word, tensor in tensors.items():
            assert not tensor.requires_grad
            assert torch.isfinite(tensor).all(), word


@pytest.mark.parametrize("case", LOW_RANK, ids=str)
def test_the_halves_are_the_change_and_the_file(case: Case):
    adapter = moved(adapter_for(case))
    for site in case.sites:
        held = adapter.parameters[site.name]
        assert case.network.halves is not None
        down, up = case.network.halves(held)
        weight = held_by(layer_of(site))["weight"]
        change = case.network.merged(held, site, 1.5, {"weight": weight})["weight"] - weight
        expected = 1.5 * (up @ down.flatten(1))
        assert_close(change.flatten(1), expected, rtol=0, atol=ROUNDING)
        tensors = adapter.modules()[site.name]
        file_up, file_down = (tensors[f"lora_{half}.weight"].flatten(1) for half in ("up", "down"))
        if (mid := tensors.get("lora_mid.weight")) is not None:
            file_down = torch.einsum("rshw,si->rihw", mid, file_down).flatten(1)
        scale = float(tensors["alpha"]) / file_up.shape[1]
        assert scale == pytest.approx(adapter.scales[site.name], rel=1e-6)  # alpha has 24 bits
        assert_close(file_up @ file_down, expected.detach() / 1.5, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("case", LOW_RANK, ids=str)
def test_the_adapter_has_the_width_and_the_strength_of_its_options_at_a_layer(case: Case):
    class Own(case.network.options):  # type: ignore[misc, name-defined]
        def rank_at(self, site: Site) -> int:
            return 4 if site.kind == "linear" else 6

        def scale_at(self, site: Site) -> float:
            return 0.5 if site.kind == "linear" else 0.25

    options = Own(**{"rank": 2, "alpha": 3.0, **case.given})
    adapter = fresh_adapter(
        case.network,
        options,
        case.sites,
        seed=0,
        dtype=torch.float64,
        device=CPU,
        models={"toy": Toy()},
    )
    for site in case.sites:
        rank, scale = (4, 0.5) if site.kind == "linear" else (6, 0.25)
        assert adapter.parameters[site.name]["up"].shape == (site.outputs, rank)
        assert len(adapter.parameters[site.name]["down"]) == rank
        assert adapter.scales[site.name] == scale


def rank_axis(site: Site) -> int:
    return 1 if site.kind == "conv" else -1


@pytest.mark.parametrize("case", LOW_RANK, ids=str)
def test_a_gate_gets_the_ranks_and_what_it_leaves_out_is_not_added(case: Case):
    for site in case.sites:
        held, call = moved(adapter_for(case)).parameters[site.name], call_of(site)
        rank = case.options().rank_at(site)
        whole = case.network.forward(held, call)
        shapes: list[tuple[int, ...]] = []

        def only(place: int, site: Site = site, shapes: list[tuple[int, ...]] = shapes) -> Gate:
            def gate(hidden: Tensor) -> Tensor:
                shapes.append(tuple(hidden.shape))
                kept = torch.zeros(hidden.shape[rank_axis(site)], dtype=hidden.dtype)
                kept[place] = 2.0
                return hidden * (kept[:, None, None] if site.kind == "conv" else kept)

            return gate

        def gated(gate: Gate, held: Any = held, call: Call = call) -> Tensor:
            return case.network.forward(held, call._replace(gate=gate))

        parts = [gated(only(place)) - call.base_output for place in range(rank)]
        assert {shape[rank_axis(site)] for shape in shapes} == {rank}
        assert {shape[0] for shape in shapes} == {len(call.x)}
        assert all(part.abs().max() > 0.01 for part in parts)
        # Each rank alone, doubled: together they are twice what all of them add.
        assert_close(sum(parts), 2 * (whole - call.base_output), rtol=0, atol=ROUNDING)
        assert_close(gated(lambda h: h), whole, rtol=0, atol=ROUNDING)
        assert torch.equal(gated(lambda h: h * 0), call.base_output)


def dropping(case: Case, dtype: torch.dtype = torch.float64, **shares: float) -> Adapter:
    adapter = moved(adapter_for(case, dtype, **shares))
    options = case.options(**shares)
    adapter.dropout = Dropout(options, seed=0, unit=case.network.unit(options))
    return adapter


@every_case
@pytest.mark.parametrize("word", DROPS)
def test_a_kind_of_dropout_works_or_is_refused(case: Case, word: str):
    if word not in case.network.drops:
        with pytest.raises(ValidationError, match=rf"network\.{word}: {case.kind} has none"):
            case.options(**{word: 0.5})
        return
    adapter = dropping(case, **{word: 0.5})
    Attachment(model := Toy(), "toy", adapter)
    batch = inputs(rows=len(SAMPLES))
    whole = model(*batch)
    with adapter.off():
        base = model(*batch)
    with adapter.dropping(3, SAMPLES):
        dropped = model(*batch)
        assert all(map(torch.equal, model(*batch), dropped))
    with adapter.dropping(3, SAMPLES[::-1]):
        turned = model(*(one.flip(0) for one in batch))
    for a, b in zip(turned, dropped, strict=True):
        assert_close(a.flip(0), b, rtol=0, atol=ROUNDING)
    assert all(map(torch.equal, model(*batch), whole))
    changed = [i for i in range(len(base)) if not torch.equal(base[i], whole[i])]
    assert len(changed) == len(case.sites)
    for i in changed:
        assert not torch.equal(dropped[i], whole[i])
        if word == "module_dropout":
            bare = [torch.equal(dropped[i][row], base[i][row]) for row in range(len(SAMPLES))]
            # 40 coins: fewer than 8 or more than 32 heads once in 20,000 times
            assert 8 <= sum(bare) <= 32


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout_keeps_16_bit_activations(case: Case, dtype: torch.dtype):
    if not case.network.drops:
        pytest.skip("it has none")
    adapter = dropping(case, torch.float32, **dict.fromkeys(case.network.drops, 0.3))
    Attachment(model := Toy(dtype), "toy", adapter)
    batch = inputs(dtype, rows=len(SAMPLES))
    with adapter.dropping(0, SAMPLES):
        outputs = model(*batch)
    assert {out.dtype for out in outputs} == {dtype}
    sum(out.float().sum() for out in outputs).backward()
    assert adapter.gradients.any()
    assert torch.isfinite(adapter.gradients).all()


@every_case
def test_a_norm_cap_works_or_is_refused(case: Case):
    if not case.network.low_rank:
        with pytest.raises(ValidationError, match=r"Choose network\.kind lora"):
            case.options(max_norm=1.0)
    elif case.given.get("start") == "pissa":
        with pytest.raises(ValidationError, match="Leave one of them out"):
            case.options(max_norm=1.0)
    else:
        assert case.options(max_norm=1.0).max_norm == 1.0


def three(case: Case, dtype: torch.dtype = torch.float64) -> list[Adapter]:
    """Adapters that were trained apart, with other alphas."""
    return [
        moved(adapter_for(case, dtype, seed=seed, alpha=alpha), seed=seed)
        for seed, alpha in enumerate((3.0, 1.0, 8.0))
    ]


WHOSE, HOW_MUCH = [2, 0, 2, 1, 1], [1.0, 0.5, 0.0, 1.0, -2.0]
Loss = Callable[[tuple[Tensor, ...], slice], Tensor]


def weighed(outputs: tuple[Tensor, ...], rows: slice) -> Tensor:
    """A loss in which every number counts differently; `outputs` are these rows of the batch."""
    parts = [
        (out * normal(40 + i, 5, *out.shape[1:]).to(out)[rows]).sum()
        for i, out in enumerate(outputs)
    ]
    return sum(parts[1:], parts[0])


@every_case
def test_rows_of_a_pack_are_their_adapters_alone(case: Case):
    adapters, model = three(case), Toy()
    attachment = Attachment(model, "toy", adapters[0])
    batch = inputs(rows=5)
    attachment.adapter = None
    base = model(*batch)
    expected = []
    for row, (k, strength) in enumerate(zip(WHOSE, HOW_MUCH, strict=True)):
        attachment.adapter = adapters[k]
        adapters[k].strength = strength
        rows = slice(row, row + 1)
        alone = model(*(one[rows] for one in batch))
        expected.append(alone)
        if strength:
            weighed(alone, rows).backward()
    pack = Pack(adapters)
    attachment.adapter = pack
    assert all(map(torch.equal, model(*batch), base))
    with pack.rows(WHOSE, HOW_MUCH):
        together = model(*batch)
    for place, found in enumerate(together):
        for row, alone in enumerate(expected):
            assert_close(found[row], alone[place][0], rtol=0, atol=ROUNDING)
        assert torch.equal(found[2], base[place][2])
    weighed(together, slice(0, 5)).backward()
    assert pack.values.grad is pack.gradients
    for k, adapter in enumerate(adapters):
        assert torch.equal(pack.values[k], adapter.values)
        assert_close(pack.gradients[k], adapter.gradients, rtol=1e-9, atol=1e-10)
    assert all(weight.grad is None for weight in model.parameters())


@every_case
def test_gradients_of_a_pack_reach_the_adapters_of_the_rows_alone(case: Case):
    pack, model = Pack(three(case)), Toy()
    attachment = Attachment(model, "toy")
    attachment.attach(case.sites)
    attachment.adapter = pack
    with pack.rows([1, 1]):
        outputs = model(*inputs())
    sum(out.square().sum() for out in outputs).backward()
    assert pack.gradients[1].any()
    assert not pack.gradients[[0, 2]].any()


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pack_keeps_16_bit_activations(case: Case, dtype: torch.dtype):
    adapters, model = three(case, torch.float32), Toy(dtype)
    attachment = Attachment(model, "toy", adapters[0])
    batch = inputs(dtype, rows=5)
    attachment.adapter = pack = Pack(adapters)
    with pack.rows(WHOSE, HOW_MUCH):
        together = model(*batch)
    assert {out.dtype for out in together} == {dtype}
    attachment.adapter = adapters[2]
    alone = model(*(one[:1] for one in batch))
    for found, expected in zip(together, alone, strict=True):
        # bf16 has 8 bits of mantissa, and sums are taken in another order
        assert_close(found[:1].float(), expected.float(), rtol=5e-2, atol=0.25)


def test_adapters_that_are_not_alike_do_not_share_a_pass():
    first = adapter_for(Case("lora"))
    with pytest.raises(OptionError, match="of other networks or sit on other layers"):
        Pack([first, adapter_for(Case("locon"))])
    with pytest.raises(OptionError, match="of other networks or sit on other layers"):
        Pack([first, adapter_for(Case("lora"), sites=SITES[:1])])
    with pytest.raises(OptionError, match="have other ranks"):
        Pack([first, adapter_for(Case("lora", {"rank": 3}))])
    with pytest.raises(OptionError, match="drawn for one adapter at a time"):
        Pack([dropping(Case("lora"), dropout=0.5)])
