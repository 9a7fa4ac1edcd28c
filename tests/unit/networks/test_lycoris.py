"""The other algorithms: a closed form of each, their files, where they sit, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from frozen_layers import LAYERS, Trained, normal
from pydantic import ValidationError
from torch import Tensor
from torch.func import vmap
from torch.testing import assert_close

from raylora.base.site import Site
from raylora.networks import Call
from raylora.networks.lycoris import LycorisOptions, butterfly, fits
from raylora.networks.oft import turn

ROUNDING = 1e-11  # float64 in another order
NORMS = ("layer_norm", "group_norm", "rms_norm")
ALGOS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"algo": "boft", "rank": 4}, LAYERS),
    ({"algo": "boft", "rank": 4, "rescale": True}, LAYERS),
    ({"algo": "boft", "rank": 4, "alpha": 0.02}, LAYERS),
    ({"algo": "glora", "rank": 3, "alpha": 4.5}, LAYERS),
    ({"algo": "ia3"}, LAYERS),
    ({"algo": "ia3", "on_input": True}, LAYERS),
    ({"algo": "full"}, LAYERS),
    ({"algo": "norms"}, NORMS),
]
every_algo = pytest.mark.parametrize(
    ("given", "name"), [(given, name) for given, names in ALGOS for name in names], ids=str
)


def trained(name: str, **given: Any) -> Trained:
    return Trained(name, LycorisOptions(**given), outputs=16)


@every_algo
def test_it_is_merged_and_read_as_it_is_applied(given: dict[str, Any], name: str):
    one = trained(name, **given)
    merged = one.merged()
    assert_close(
        one.output(), one.of_weight(merged["weight"], merged.get("bias")), rtol=0, atol=ROUNDING
    )
    assert (one.output() - one.layer(one.x)).abs().max() > 0.01
    assert_close(one.output(one.first), one.layer(one.x), rtol=0, atol=0)
    for word, tensor in one.read().items():
        assert_close(merged[word], tensor, rtol=0, atol=ROUNDING)


@every_algo
def test_strength_and_a_gate_scale_its_change(given: dict[str, Any], name: str):
    one = trained(name, **given)
    base = one.layer(one.x)
    whole = one.output() - base
    assert_close(one.output(strength=-0.5), base - 0.5 * whole, rtol=0, atol=ROUNDING)
    keep = torch.tensor([1.0, 0.0]).double().view(2, *[1] * (one.x.dim() - 1))
    gated = one.output(gate=lambda hidden: hidden * keep)
    assert_close(gated - base, whole * keep, rtol=0, atol=ROUNDING)
    assert torch.equal(gated[1], base[1])


@every_algo
def test_its_gradients_are_those_of_its_merged_weights(given: dict[str, Any], name: str):
    one = trained(name, **given)
    leaves = {word: leaf.clone().requires_grad_() for word, leaf in one.held.items()}
    weights = normal(9, *one.layer(one.x).shape)
    one.held = leaves
    merged = one.merged()
    swapped = one.of_weight(merged["weight"], merged.get("bias"))
    found, expected = (
        torch.autograd.grad((output * weights).sum(), list(leaves.values()))
        for output in (one.output(), swapped)
    )
    assert all(gradient.abs().max() > 0 for gradient in found)
    assert_close(found, expected, rtol=1e-9, atol=ROUNDING)


@every_algo
def test_several_can_be_batched(given: dict[str, Any], name: str):
    one = trained(name, **given)
    others = {word: tensor.flip(0) for word, tensor in one.held.items()}
    stacked = {word: torch.stack([one.held[word], others[word]]) for word in others}
    scales = torch.tensor([one.scale, one.scale / 2]).double()
    base = one.layer(one.x)

    def row(held: dict[str, Tensor], x: Tensor, base: Tensor, scale: Tensor) -> Tensor:
        call = Call(x[None], base[None], scale, 1.0, one.site, one.layer)
        return one.network.pure(held, call)[0]

    batched = vmap(row)(stacked, one.x, base, scales)
    for i, held in enumerate((one.held, others)):
        alone = one.output(held, scale=float(scales[i]))
        assert_close(batched[i], alone[i], rtol=0, atol=ROUNDING)


@every_algo
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_stay_so(given: dict[str, Any], name: str, dtype: torch.dtype):
    one = trained(name, **given)
    held = {word: leaf.float() for word, leaf in one.held.items()}
    exact = one.output()
    one.layer.to(dtype)
    one.x = one.x.to(dtype)
    output = one.output(held)
    assert output.dtype == dtype
    assert_close(output.double(), exact, rtol=5e-2, atol=0.3)  # bf16 has 8 bits of mantissa


@pytest.mark.parametrize("name", LAYERS)
def test_glora_is_its_papers_formula(name: str):
    one = trained(name, algo="glora", rank=3, alpha=4.5)
    held = one.held
    reused = torch.einsum("oi...,ij->oj...", one.frozen, held["a1"] @ held["a2"])
    own = (held["b1"] @ held["b2"].flatten(1)).view(one.frozen.shape)
    expected = one.frozen + 1.5 * (reused + own)
    assert_close(one.output(), one.of_weight(expected), rtol=0, atol=ROUNDING)
    assert float(one.file["alpha"]) == 4.5
    kernel = {"tokens": (), "pixels": (1, 1), "kernel": (3, 3)}[name]
    ones = (1,) * len(kernel)
    assert {word: tuple(t.shape) for word, t in one.file.items() if word != "alpha"} == {
        "a1.weight": (12, 3, *ones),
        "a2.weight": (3, 12, *ones),
        "b1.weight": (16, 3, *ones),
        "b2.weight": (3, 12, *kernel),
    }


@pytest.mark.parametrize("name", LAYERS)
def test_boft_is_a_product_of_rotations_further_and_further_apart(name: str):
    one = trained(name, algo="boft", rank=4)
    blocks = one.held["oft_blocks"]
    assert blocks.shape == (3, 4, 4, 4)  # 16 outputs: 4 blocks of 4, and 1 + log2(4) stages
    whole = torch.eye(16, dtype=torch.float64)
    for stage, rotations in enumerate(torch.eye(4).double() + turn(blocks, 0.0)):
        apart = 2 * 2**stage
        # Outputs p and p + apart are neighbours in a block, for p in each first half of 2 apart.
        order = [
            start + half * apart + p
            for start in range(0, 16, 2 * apart)
            for p in range(apart)
            for half in (0, 1)
        ]
        butterfly_of = torch.zeros(16, 16, dtype=torch.float64)
        within = torch.block_diag(*rotations)
        for i in range(16):
            for j in range(16):
                butterfly_of[order[i], order[j]] = within[i, j]
        whole = butterfly_of @ whole
    assert_close(whole @ whole.T, torch.eye(16).double(), rtol=0, atol=1e-12)
    assert (whole.abs() > 1e-6).all()  # every output reaches every other
    expected = (whole @ one.frozen.flatten(1)).view(one.frozen.shape)
    assert_close(one.merged()["weight"], expected, rtol=0, atol=ROUNDING)
    assert_close(one.output(), one.of_weight(expected), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("tokens", (2, 40, 12)), ("pixels", (2, 12, 8, 8)), ("kernel", (2, 12, 24, 24))],
)
def test_boft_turns_the_weight_where_there_are_more_outputs(name: str, shape: tuple[int, ...]):
    one = trained(name, algo="boft", rank=4)
    one.x = normal(31, *shape)
    kept: list[int] = []

    def look(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    leaves = {word: leaf.clone().requires_grad_() for word, leaf in one.held.items()}
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        output = one.output(leaves)
    assert output.numel() not in kept  # as each stage of the outputs would be
    assert_close(output, one.of_weight(one.merged()["weight"]), rtol=0, atol=ROUNDING)
    alone = one.call(x=one.x[:1], base_output=one.layer(one.x[:1]))
    assert_close(one.network.forward(leaves, alone), output[:1], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_ia3_is_one_factor_a_channel(name: str, on_input: bool):
    one = trained(name, algo="ia3", on_input=on_input)
    (factors,) = one.held.values()
    assert factors.shape == ((12,) if on_input else (16,))
    shape = [1] * one.frozen.dim()
    shape[int(on_input)] = -1
    assert_close(
        one.output(), one.of_weight(one.frozen * (1 + factors.view(shape))), rtol=0, atol=ROUNDING
    )
    assert int(one.file["on_input"]) == int(on_input)
    assert one.file["weight"].shape == (
        factors.shape if name == "tokens" else (1, len(factors), 1, 1)
    )


def test_a_bias_is_trained_where_there_is_one():
    assert set(trained("tokens", algo="full").first) == {"diff", "diff_b"}
    assert set(trained("pixels", algo="full").first) == {"diff"}
    assert set(trained("layer_norm", algo="norms").first) == {"w_norm", "b_norm"}
    assert set(trained("rms_norm", algo="norms").first) == {"w_norm"}
    assert trained("pixels", algo="full").file["diff"].shape == (16, 12, 1, 1)


@pytest.mark.slow
def test_norms_by_root_mean_square_are_those_of_transformers_and_diffusers():
    from diffusers.models.normalization import RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    one = trained("rms_norm", algo="norms")
    for layer in (T5LayerNorm(12, eps=1e-5), RMSNorm(12, eps=1e-5)):
        with torch.no_grad():
            layer.weight.copy_(normal(3, 12))
        one.layer = layer.requires_grad_(False)
        expected = one.of_weight(one.merged()["weight"].float())
        assert_close(one.output().float(), expected.float(), rtol=0, atol=1e-5)  # they cast to fp32


def test_each_says_where_it_cannot_sit():
    linear, norm = Site("toy.tokens", "linear", 12, 9), Site("toy.norm", "norm", 12, 12)
    for algo in ("glora", "ia3", "full"):
        assert fits(LycorisOptions(algo=algo), linear) is None
        assert fits(LycorisOptions(algo=algo), norm) == (
            f"{algo} is for linear layers and convolutions, and this is a norm"
        )
    assert fits(LycorisOptions(algo="norms"), norm) is None
    assert "network.layers: [norm]" in str(fits(LycorisOptions(algo="norms"), linear))
    boft = LycorisOptions(algo="boft", rank=4)
    why = fits(boft, linear)
    assert why is not None
    assert why.startswith("its 9 outputs are no power of two times an even number up to")
    assert "(network.rank 6 is enough)" in str(fits(boft, Site("toy.tokens", "linear", 12, 24)))
    assert fits(LycorisOptions(algo="boft", rank=6), Site("toy.tokens", "linear", 12, 24)) is None
    assert fits(boft, norm) is not None


@pytest.mark.parametrize(
    ("outputs", "rank", "shape"),
    [(16, 4, (3, 4, 4)), (320, 16, (6, 32, 10)), (1280, 16, (8, 128, 10)), (6, 16, (1, 1, 6))],
)
def test_blocks_of_a_butterfly(outputs: int, rank: int, shape: tuple[int, int, int]):
    assert butterfly(outputs, rank) == shape
    assert shape[1] * shape[2] == outputs


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"algo": "full", "rank": 4}, r"network\.rank: full has none\. Leave it out, or set"),
        ({"algo": "ia3", "alpha": 1.0}, r"network\.alpha: ia3 has none"),
        ({"algo": "norms", "alphas": {"norm": 1.0}}, r"network\.alphas: norms has none"),
        ({"algo": "glora", "rescale": True}, r"network\.rescale: glora has none.*algo: boft"),
        ({"algo": "full", "on_input": True}, r"network\.on_input: full has none.*algo: ia3"),
        ({"algo": "boft", "dropout": 0.1}, r"network\.dropout: boft has none.*algo: glora"),
        ({"algo": "full", "rank_dropout": 0.1}, r"network\.rank_dropout: full has none"),
        ({"algo": "glora", "max_norm": 1.0}, r"network\.max_norm caps the product of two halves"),
        ({"algo": "loha"}, r"loha is a kind of its own\. Set network\.kind: loha"),
        ({"algo": "diag-oft"}, r"diag-oft is a kind of its own\. Set network\.kind: oft"),
        ({"algo": "tlora"}, r"Input should be 'boft'"),
    ],
    ids=str,
)
def test_what_an_algorithm_has_no_use_for_is_refused(given: dict[str, Any], why: str):
    with pytest.raises(ValidationError, match=why):
        LycorisOptions(**given)
