"""Linears in fewer bits: the formulas, the bytes, and what whoever meets such a layer relies on."""

from __future__ import annotations

import copy
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from adapters import random_module
from bases import open_tiny
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.adapt.attach import Attachment
from raylora.adapt.merge import merge_lora
from raylora.base.lookup import plugins
from raylora.base.unit import Unit
from raylora.components.sites import site_of
from raylora.memory.bases import (
    HeldLinear,
    base_problem,
    bytes_of_unit,
    get_base,
    hold_linears,
)
from raylora.memory.need import UnitNeed
from raylora.memory.setting import BASE_KINDS
from raylora.networks import Call, get_network

CPU, META = torch.device("cpu"), torch.device("meta")
KINDS = plugins("raylora.memory.bases")
every_kind = pytest.mark.parametrize("kind", KINDS)
# (320, 64) is whole blocks of all kinds; the others leave rests.
SHAPES = [(320, 64), (3, 10), (50, 14), (1, 64)]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def layer_of(weight: Tensor, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    if bias:
        layer.bias.data.copy_(normal(99, len(weight)))
    return layer.requires_grad_(False)


def held(kind: Any, weight: Tensor, *, bias: bool = True) -> HeldLinear:
    return get_base(kind).make(layer_of(weight, bias=bias), CPU)


def bytes_in(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


# The formulas


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_nearest_127th_of_each_rows_largest(shape: tuple[int, int]):
    weight = normal(1, *shape)
    numbers = weight.numpy()
    steps = np.abs(numbers).max(1, keepdims=True) / np.float32(127)
    expected = np.rint(numbers / steps) * steps
    assert_close(held("int8", weight).weight, torch.from_numpy(expected), rtol=0, atol=0)


def e4m3_numbers() -> Tensor:
    """All that 4 bits of exponent and 3 of mantissa write, up to 448."""
    normals = [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
    small = [m / 8 * 2.0**-6 for m in range(8)]
    sizes = torch.tensor(sorted({*small, *normals}), dtype=torch.float64)
    sizes = sizes[sizes <= 448]
    return torch.cat([-sizes.flip(0), sizes])


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_the_nearest_e4m3_number_times_its_blocks_power_of_two(shape: tuple[int, int]):
    weight = normal(2, *shape)
    weight.view(-1)[:1] = 3000.0  # one block has a scale of its own, which the others must not feel
    got = held("fp8", weight).weight.double().flatten().split(128)
    for block, found in zip(weight.double().flatten().split(128), got, strict=True):
        power = 2.0 ** math.ceil(math.log2(float(block.abs().max()) / 448))
        levels = e4m3_numbers() * power
        nearest = (block[:, None] - levels).abs().min(1).values
        assert_close((found - block).abs(), nearest, rtol=0, atol=0)


def nf4_numbers() -> Tensor:
    """Quantiles of a Gaussian, eight above zero and seven below, as the paper's appendix E."""
    quantile = NormalDist().inv_cdf
    ends = 0.9677083
    above = [quantile(p) for p in np.linspace(ends, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(ends, 0.5, 8)[:-1]]
    numbers = torch.tensor(sorted([0.0, *above, *below]), dtype=torch.float64)
    return numbers / numbers.max()


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_nearest_quantile_times_its_blocks_largest(shape: tuple[int, int]):
    weight = normal(3, *shape)
    got = held("nf4", weight).weight.double().flatten().split(64)
    for block, found in zip(weight.double().flatten().split(64), got, strict=True):
        levels = nf4_numbers() * block.abs().max()
        nearest = (block[:, None] - levels).abs().min(1).values
        # bitsandbytes' table has the quantiles to 7 digits.
        assert_close((found - block).abs(), nearest, rtol=0, atol=1e-6 * float(block.abs().max()))


def test_errors_on_gaussian_weights_are_those_of_the_formats():
    weight = normal(4, 512, 1024)
    # Rounding to the nearest of even steps: 1/√12 of a step, which is a row's largest / 127.
    steps = weight.abs().amax(1, keepdim=True).expand_as(weight) / 127
    int8 = error(held("int8", weight).weight, weight)
    assert_close(int8, float(steps.norm() / weight.norm()) / math.sqrt(12), rtol=0.01, atol=0)
    assert 0.006 < int8 < 0.009
    # Half a step is at most 1/16 of a number; within an octave steps are even, so that the mean
    # square is (1/8)²/12 over a mean square of 7/3 (numbers even in the octave) to 2.16 (even in
    # the logarithm), and a little less toward a Gaussian's tail.
    assert 0.0236 < error(held("fp8", weight).weight, weight) < 0.028
    # 0.09 was measured of bitsandbytes' own layer on such weights.
    assert 0.085 < error(held("nf4", weight).weight, weight) < 0.097


@every_kind
def test_rows_of_zeros_stay_zero_and_tiny_ones_stay_what_they_are(kind: str):
    weight = normal(5, 4, 128)
    weight[1] = 0
    weight[2] *= 1e-20
    got = held(kind, weight).weight
    assert not got[1].any()
    assert 0 < error(got[2], weight[2]) < 0.12
    assert got.isfinite().all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_another_dtype_it_is_the_same_weight_rounded_once(kind: str, dtype: torch.dtype):
    layer = held(kind, normal(6, 96, 64))
    wide = layer.weight
    assert_close(layer.to(dtype).weight, wide.to(dtype), rtol=0, atol=0)


# The layer


@every_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_a_linear_with_that_weight(
    kind: str, bias: bool, dtype: torch.dtype
):
    layer = held(kind, normal(7, 48, 64, dtype=dtype), bias=bias)
    plain = layer_of(layer.weight, bias=bias)
    x, of_y = normal(8, 2, 5, 64, dtype=dtype), normal(9, 2, 5, 48, dtype=dtype)
    found = []
    for one in (layer, plain):
        given = x.clone().requires_grad_()
        y = one(given)
        y.backward(of_y)
        found.append((y.detach(), given.grad))
    assert_close(found[0], found[1], rtol=0, atol=0)


@every_kind
def test_between_forward_and_backward_the_packed_weight_alone_is_kept(kind: str):
    layer = held(kind, normal(10, 256, 128))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(normal(11, 64, 128).requires_grad_())
    assert {t.data_ptr() for t in kept} == {layer.packed.data_ptr(), layer.scales.data_ptr()}
    assert sum(t.nbytes for t in kept) == get_base(kind).bytes_of(256, 128)


@every_kind
def test_no_cast_of_the_module_reaches_what_is_packed(kind: str):
    layer = held(kind, normal(12, 32, 64))
    before = copy.deepcopy(dict(layer.named_buffers()))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        nn.Sequential(layer).to(dtype)
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert layer(normal(13, 2, 64, dtype=dtype)).dtype == dtype
    after = dict(layer.named_buffers())
    assert after.keys() == before.keys() == {"packed", "scales"}
    for name, buffer in before.items():
        assert after[name].dtype == buffer.dtype
        assert torch.equal(after[name], buffer)


@every_kind
def test_its_buffers_may_lie_in_a_slot_of_bytes_and_be_swapped_for_others(kind: str):
    """As a ring for streaming packs them: views into one buffer that is filled anew."""
    layers = [held(kind, normal(seed, 32, 64)) for seed in (14, 15)]
    x = normal(16, 3, 64)
    expected = [layer(x) for layer in layers]
    slot = torch.empty(4096, dtype=torch.uint8)
    for layer, wanted in zip(layers, expected, strict=True):
        start = 0
        for name, buffer in list(layer.named_buffers()):
            place = slot[start : start + buffer.nbytes].view(buffer.dtype).view(buffer.shape)
            place.copy_(buffer)
            layer._buffers[name] = place
            start += -(-buffer.nbytes // 256) * 256
        assert torch.equal(layer(x), wanted)
    slot.zero_()
    assert not torch.equal(layers[1](x), expected[1])


@every_kind
def test_it_can_be_copied_and_its_state_loaded(kind: str):
    first, other = held(kind, normal(17, 32, 64)), held(kind, normal(18, 32, 64))
    copied = copy.deepcopy(other)
    copied.load_state_dict(first.state_dict())
    assert torch.equal(copied.weight, first.weight)
    assert not torch.equal(copied.weight, other.weight)


# The bytes


@every_kind
@pytest.mark.parametrize("shape", [*SHAPES, (3, 7)])
def test_bytes_are_those_that_lie_there_on_meta_too(kind: str, shape: tuple[int, int]):
    said = get_base(kind).bytes_of(*shape)
    assert bytes_in(held(kind, normal(20, *shape), bias=False)) == said
    blank = nn.Linear(shape[1], shape[0], bias=False, device=META)
    on_meta = get_base(kind).make(blank, META)
    assert bytes_in(on_meta) == said
    assert on_meta(torch.empty(2, shape[1], device=META)).shape == (2, shape[0])


class Block(nn.Module):
    """Linears of several shapes among other layers, as blocks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.norm = nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64, bias=False))
        self.out = nn.Linear(64, 32)


def need_of(block: nn.Module) -> UnitNeed:
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    numbers = [m.weight.numel() for m in linears]
    everything = sum(t.numel() for t in (*block.parameters(), *block.buffers()))
    return UnitNeed(
        name="block",
        linear_numbers=sum(numbers),
        other_numbers=everything - sum(numbers),
        largest_linear=max(numbers),
        linear_rows=sum(m.out_features for m in linears),
    )


@pytest.mark.parametrize("kind", BASE_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_bytes_of_a_unit_are_those_of_all_that_it_holds(
    kind: Any, dtype: torch.dtype, device: torch.device
):
    block = Block().to(device=device, dtype=dtype)
    need = need_of(block)
    hold_linears(Unit("block", block), kind, device)
    assert bytes_of_unit(need, kind, dtype.itemsize) == bytes_in(block)


@every_kind
def test_bytes_of_a_true_unit_are_exact(kind: str):
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    with META:
        block = FluxSingleTransformerBlock(3072, 24, 128).to(torch.bfloat16)
    need = need_of(block)
    hold_linears(Unit("block", block), kind, META)
    said = bytes_of_unit(need, kind, 2)
    assert said == bytes_in(block)
    per_number = {"int8": 1.0, "fp8": 1 + 2 / 128, "nf4": 1 / 2 + 4 / 64}[kind]
    rows = 4 * need.linear_rows if kind == "int8" else 0
    assert said == per_number * need.linear_numbers + rows + 2 * need.other_numbers


# Holding a model's


@every_kind
def test_only_linears_are_held_and_they_stay_the_objects_that_they_were(kind: str):
    block = Block()
    first, others = block.mlp[0], {id(m) for m in block.modules()}
    conv, bias = block.conv.weight.clone(), block.mlp[0].bias.clone()
    hold_linears(Unit("block", block), kind, CPU)
    assert block.mlp[0] is first
    assert {id(m) for m in block.modules()} == others
    found = [m for m in block.modules() if isinstance(m, nn.Linear)]
    assert len(found) == 3
    assert all(isinstance(m, HeldLinear) for m in found)
    assert torch.equal(block.conv.weight, conv)
    assert torch.equal(block.mlp[0].bias, bias)
    assert not any(p.requires_grad for m in found for p in m.parameters())


@every_kind
def test_holding_twice_is_holding_once(kind: str):
    block = Block()
    hold_linears(Unit("block", block), kind, CPU)
    before = copy.deepcopy(block.state_dict())
    hold_linears(Unit("block", block), kind, CPU)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_full_leaves_everything_as_it_is():
    block = Block()
    hold_linears(Unit("block", block), "full", CPU)
    assert not any(isinstance(m, HeldLinear) for m in block.modules())


def test_a_layer_that_carries_an_adapter_is_not_held():
    block = Block()
    site = site_of("toy.out", block.out)
    assert site is not None
    Attachment(block, "toy").attach([site])
    with pytest.raises(AssertionError, match="carries an adapter already"):
        hold_linears(Unit("block", block), "int8", CPU)


def test_a_lora_cannot_be_merged_into_what_is_held():
    block = Block()
    hold_linears(Unit("block", block), "int8", CPU)
    with pytest.raises(AssertionError):
        merge_lora("toy", block, {"toy.out": random_module("toy.out", (32, 64))}, 1.0)


# Who meets it

RANK = {"rank": 4, "alpha": 3.0}
NETWORKS = [
    *((kind, RANK) for kind in plugins("raylora.networks") if kind != "lycoris"),
    ("lora", {**RANK, "start": "pissa"}),
    ("dora", {**RANK, "axis": "input", "norm_gradient": True}),
    *(("lycoris", {**RANK, "algo": algo}) for algo in ("boft", "glora")),
    *(("lycoris", {"algo": algo}) for algo in ("ia3", "full")),
    ("lycoris", {"algo": "ia3", "on_input": True}),
]


def through(layer: nn.Linear, word: str, given: dict[str, Any]) -> tuple[Any, ...]:
    """A network on a layer, every number moved: output, gradients, and the weights as merged."""
    network, site = get_network(word), site_of("toy.layer", layer)
    options = network.options(**given)
    assert site is not None
    assert network.fits(options, site) is None
    draw = np.random.default_rng(31)
    arrays = network.initial(
        options, site, lambda shape: draw.uniform(-1, 1, shape), lambda: layer.weight.numpy()
    )
    leaves = {
        name: torch.from_numpy(np.array(array) + 0.1 * draw.normal(size=array.shape))
        for name, array in arrays.items()
    }
    x = normal(32, 2, 5, 32, dtype=torch.float64).requires_grad_()
    for leaf in leaves.values():
        leaf.requires_grad_()
    call = Call(x, layer(x), options.scale_at(site), 1.0, site, layer)
    output = network.forward(leaves, call)
    output.backward(normal(33, *output.shape, dtype=torch.float64))
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients
    frozen = {"weight": layer.weight, "bias": layer.bias}
    merged = network.merged({n: leaf.detach() for n, leaf in leaves.items()}, site, 1.0, frozen)
    return output.detach(), x.grad, gradients, merged


@every_kind
@pytest.mark.parametrize(("word", "given"), NETWORKS)
def test_every_network_is_on_it_what_it_is_on_a_linear_of_that_weight(
    kind: str, word: str, given: dict[str, Any]
):
    layer = held(kind, normal(30, 16, 32, dtype=torch.float64))
    found, expected = (through(one, word, given) for one in (layer, layer_of(layer.weight)))
    assert_close(found, expected, rtol=0, atol=0)


@every_kind
@pytest.mark.parametrize("family", ["sd15", "flux1"])
def test_a_models_sites_are_the_same_on_it(kind: str, family: str):
    opened = open_tiny(family)
    denoiser = opened.load_denoiser(dtype=torch.float32, device=CPU)
    before = opened.sites(denoiser)
    hold_linears(Unit("all", denoiser), kind, CPU)
    assert opened.sites(denoiser) == before
    assert any(isinstance(m, HeldLinear) for m in denoiser.modules())


def test_what_is_missing_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch):
    assert [base_problem(kind) for kind in BASE_KINDS] == [None] * 4
    monkeypatch.setattr("raylora.memory.bases.nf4.find_spec", lambda name: None)
    told = base_problem("nf4")
    assert told is not None
    assert (
        'needs the package bitsandbytes, which is not installed. pip install "raylora[bnb]"' in told
    )
    assert [base_problem(kind) for kind in ("full", "int8", "fp8")] == [None] * 3


def test_every_word_but_full_is_a_file():
    assert sorted({*BASE_KINDS} - {"full"}) == KINDS
