"""LoRA itself: its first weights, its formula, its file. What all networks do is in contract/."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from raylora.base.errors import OptionError
from raylora.base.site import Site
from raylora.networks import Call, get_network
from raylora.networks.lora import LoraOptions, export, initial, largest_directions, network

LINEAR = Site("unet.q", "linear", 40, 30)
CONV = Site("unet.p", "conv", 40, 30)


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape)


def no_weight() -> np.ndarray:
    raise AssertionError("plain LoRA does not ask for it")


def forward(
    held: dict[str, torch.Tensor], x: torch.Tensor, base: torch.Tensor, scale: float, site: Site
) -> torch.Tensor:
    return network.forward(held, Call(x, base, scale, 1.0, site, torch.nn.Identity()))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_first_weights_are_uniform_within_one_over_root_of_inputs_and_zero():
    held = initial(LoraOptions(rank=500), LINEAR, draw, no_weight)
    bound = 1 / np.sqrt(40)
    assert held["down"].shape == (500, 40)
    assert 0.99 * bound < abs(held["down"]).max() <= bound
    assert held["down"].std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    # torch's kaiming_uniform_(a=sqrt(5)), by which sd-scripts and peft begin
    theirs = torch.empty(500, 40)
    torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)
    assert float(theirs.abs().max()) == pytest.approx(abs(held["down"]).max(), rel=0.01)
    assert held["up"].shape == (30, 500)
    assert not held["up"].any()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_output_is_base_plus_scale_times_up_of_down(scale: float):
    down, up = normal(0, 3, 40), normal(1, 30, 3)
    x, base = normal(2, 2, 5, 40), normal(3, 2, 5, 30)
    found = forward({"down": down, "up": up}, x, base, scale, LINEAR)
    assert_close(found, base + scale * (x @ down.T) @ up.T, rtol=0, atol=1e-12)
    pixels, base = normal(4, 2, 40, 3, 4), normal(5, 2, 30, 3, 4)
    found = forward({"down": down, "up": up}, pixels, base, scale, CONV)
    expected = base + scale * torch.einsum("or,ri,bihw->bohw", up, down, pixels)
    assert_close(found, expected, rtol=0, atol=1e-12)


def test_inputs_that_are_not_contiguous_are_taken():
    down, up = normal(0, 3, 40), normal(1, 30, 3)
    x, base = normal(2, 40, 5, 2).permute(2, 1, 0), normal(3, 30, 5, 2).permute(2, 1, 0)
    found = forward({"down": down, "up": up}, x, base, 1.0, LINEAR)
    assert_close(found, base + (x @ down.T) @ up.T, rtol=0, atol=1e-12)
    pixels, base = (normal(seed, 3, 4, 2, n).permute(2, 3, 0, 1) for seed, n in ((4, 40), (5, 30)))
    found = forward({"down": down, "up": up}, pixels, base, 1.0, CONV)
    expected = base + torch.einsum("or,ri,bihw->bohw", up, down, pixels)
    assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (8.0, 1.0), (2.0, 0.25), (16.0, 2.0)])
def test_strength_is_alpha_over_rank(alpha: float | None, scale: float):
    options = LoraOptions(rank=8, alpha=alpha)
    assert options.scale_at(LINEAR) == scale
    held = {"down": normal(0, 8, 40), "up": normal(1, 30, 8)}
    tensors = export(held, LINEAR, scale)
    assert float(tensors["alpha"]) == (alpha or 8.0)
    assert tensors["alpha"].dtype == torch.float32


def test_convolutions_have_four_dimensions_in_the_file():
    held = {"down": normal(0, 8, 40), "up": normal(1, 30, 8)}
    tensors = export(held, CONV, 1.0)
    assert tensors["lora_down.weight"].shape == (8, 40, 1, 1)
    assert tensors["lora_up.weight"].shape == (30, 8, 1, 1)
    assert export(held, LINEAR, 1.0)["lora_up.weight"].shape == (30, 8)


def test_wrong_options_are_refused():
    with pytest.raises(ValidationError):
        LoraOptions(rank=0)
    with pytest.raises(ValidationError):
        LoraOptions(alpha=-1)
    with pytest.raises(OptionError, match=r"'lroa' is not known\. Did you mean 'lora'\?"):
        get_network("lroa")


def test_rslora_divides_by_the_root_and_every_reader_applies_the_same():
    options = LoraOptions(rank=16, alpha=2.0, scaling="sqrt_rank")
    assert options.scale_at(LINEAR) == 2.0 / 4.0
    held = {"down": normal(0, 16, 40), "up": normal(1, 30, 16)}
    tensors = export(held, LINEAR, options.scale_at(LINEAR))
    # readers know alpha / rank alone
    assert float(tensors["alpha"]) / len(tensors["lora_down.weight"]) == 0.5


WEIGHT = normal(7, 30, 40) @ torch.diag(0.8 ** torch.arange(40)).double() @ normal(8, 40, 40)


def principal(rank: int, alpha: float | None = None) -> tuple[dict[str, torch.Tensor], float]:
    options = LoraOptions(rank=rank, alpha=alpha, start="pissa")
    arrays = initial(options, LINEAR, draw, WEIGHT.numpy)
    return {word: torch.from_numpy(array) for word, array in arrays.items()}, options.scale_at(
        LINEAR
    )


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_pissa_starts_at_the_best_approximation_of_the_weight(alpha: float | None):
    held, scale = principal(5, alpha)
    u, s, v = np.linalg.svd(WEIGHT.numpy())
    best = torch.from_numpy(u[:, :5] * s[:5] @ v[:5])
    assert_close(scale * held["up"] @ held["down"], best, rtol=0, atol=1e-6)
    # both halves carry the root of each direction's size, the largest first
    for half in (held["up"].norm(dim=0), held["down"].norm(dim=1)):
        assert_close(half, torch.from_numpy(s[:5] / scale).sqrt(), rtol=1e-6, atol=0)
    largest = held["down"].gather(1, held["down"].abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)], ids=["wide", "tall"])
def test_pissas_search_finds_what_the_whole_decomposition_finds_in_a_flat_spectrum(
    shape: tuple[int, int],
):
    flat = np.random.default_rng(3).normal(size=shape)
    outer, sizes, inner = largest_directions(flat, 16, draw)
    assert_close(outer.T @ outer, np.eye(16), rtol=0, atol=1e-10)
    assert_close(inner @ inner.T, np.eye(16), rtol=0, atol=1e-10)
    assert (inner[np.arange(16), abs(inner).argmax(1)] > 0).all()
    kept = np.linalg.norm(outer * sizes @ inner)
    best = np.linalg.norm(np.linalg.svd(flat, compute_uv=False)[:16])
    assert 0.99 * best < kept < best * (1 + 1e-12)


def test_a_rank_beyond_the_layers_starts_at_zero_there():
    held, _ = principal(35)
    assert_close(held["up"] @ held["down"], WEIGHT, rtol=0, atol=1e-9)
    assert not held["up"][:, 30:].any()
    assert not held["down"][30:].any()


def test_pissas_change_is_what_was_trained_and_a_plain_lora_of_twice_the_rank():
    held, scale = principal(5, 2.0)
    held["down"] += 0.01 * normal(1, 5, 40)
    held["up"] += 0.01 * normal(2, 30, 5)
    change = scale * (held["up"] @ held["down"] - held["start_up"] @ held["start_down"])
    x, base = normal(3, 2, 4, 40), normal(4, 2, 4, 30)
    assert_close(forward(held, x, base, scale, LINEAR), base + x @ change.T, rtol=0, atol=1e-12)
    tensors = export(held, LINEAR, scale)
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    assert (len(down), float(tensors["alpha"])) == (10, scale * 10)
    assert_close(scale * up @ down, change, rtol=0, atol=1e-12)


def test_pissas_change_keeps_its_digits_in_bf16():
    held, scale = principal(5)
    small = {word: tensor.float() for word, tensor in held.items()}
    small["down"] = small["down"] + 1e-3 * normal(1, 5, 40).float()
    exact = {word: tensor.double() for word, tensor in small.items()}
    x = normal(3, 2, 4, 40)
    expected = forward(exact, x, torch.zeros(2, 4, 30).double(), scale, LINEAR)
    base = torch.zeros(2, 4, 30, dtype=torch.bfloat16)
    found = forward(small, x.bfloat16(), base, scale, LINEAR).double()
    # 8 bits of mantissa; U D alone is hundreds of times larger than the change
    assert (found - expected).norm() < 0.02 * expected.norm()


def numbers_kept(site: Site, **words: bool) -> int:
    """How many numbers a layer keeps for its gradients."""
    options = LoraOptions(rank=4, **words)
    frozen = network.constants(options, site)
    arrays = initial(options, site, draw, no_weight)
    held = {
        word: torch.from_numpy(array).requires_grad_(word not in frozen)
        for word, array in arrays.items()
    }
    kept = []
    inputs, outputs = (
        ((2, 100, 40), (2, 100, 30)) if site is LINEAR else ((2, 40, 10, 10), (2, 30, 10, 10))
    )
    x = normal(0, *inputs).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        forward(held, x, normal(1, *outputs), 1.0, site)
    return sum(kept)


@pytest.mark.parametrize("site", [LINEAR, CONV], ids=["linear", "conv"])
def test_a_frozen_down_need_not_keep_its_inputs(site: Site):
    assert numbers_kept(site) - numbers_kept(site, freeze_down=True) == 2 * 100 * 40


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"scaling": "sqrt_rank"}, r"without network\.alpha the strength is 1"),
        ({"start": "pissa", "freeze_down": True}, "Choose one of them"),
        ({"start": "pissa", "max_norm": 1.0}, "pull them away from where they began"),
        ({"start": "pissa", "initial": "a.safetensors"}, "where to begin without one"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(words: dict[str, Any], sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        LoraOptions(**words)


@pytest.mark.slow
def test_pissa_and_rslora_are_pefts():
    from peft import LoraConfig, get_peft_model

    model = torch.nn.ModuleDict({"q": torch.nn.Linear(40, 30)})
    with torch.no_grad():
        model["q"].weight.copy_(WEIGHT)
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["q"],
        use_rslora=True,
        init_lora_weights="pissa",
    )
    theirs = get_peft_model(model, config).base_model.model["q"]  # type: ignore[arg-type]
    options = LoraOptions(rank=4, alpha=3.0, scaling="sqrt_rank", start="pissa")
    held = {
        word: torch.from_numpy(array)
        for word, array in initial(options, LINEAR, draw, WEIGHT.numpy).items()
    }
    scale = options.scale_at(LINEAR)
    assert scale == theirs.scaling["default"]
    moves = 0.1 * normal(1, 4, 40), 0.1 * normal(2, 30, 4)
    down = theirs.lora_A["default"].weight.data.double()
    # the same directions, of whatever sign; then the same steps away from them
    signs = (down * held["down"]).sum(1).sign()
    assert_close(signs[:, None] * down, held["down"], rtol=0, atol=1e-3)  # they are float32
    theirs.double()
    theirs.lora_A["default"].weight.data = held["down"] + moves[0]
    theirs.lora_B["default"].weight.data = held["up"] + moves[1]
    x = normal(3, 2, 5, 40)
    trained = {**held, "down": held["down"] + moves[0], "up": held["up"] + moves[1]}
    base = torch.nn.functional.linear(x, WEIGHT, theirs.base_layer.bias)
    found = forward(trained, x, base, scale, LINEAR)
    assert_close(found, theirs(x), rtol=1e-4, atol=1e-3)
