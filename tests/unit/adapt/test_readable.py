"""Files as diffusers reads them: with its real loader in a real pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import SHAPES, TINY_BASE, random_adapter, random_module, raw_bytes
from torch import nn
from torch.testing import assert_close

from raylora.adapt.deltas import delta
from raylora.adapt.keys import Naming, layer_at
from raylora.adapt.lora_file import ALPHA, DOWN, UP, AdapterModule
from raylora.adapt.readable import completed, one_alpha, readable

NAMINGS: tuple[Naming, ...] = ("kohya", "diffusers")
LAYERS = "text_encoder.text_model.encoder.layers"
TEXT: dict[str, tuple[int, ...]] = {
    f"{LAYERS}.{layer}.{path}": shape
    for layer in (0, 1)
    for path, shape in {
        "self_attn.q_proj": (96, 96),
        "self_attn.k_proj": (96, 96),
        "self_attn.v_proj": (96, 96),
        "self_attn.out_proj": (96, 96),
        "mlp.fc1": (192, 96),
        "mlp.fc2": (96, 192),
    }.items()
}
UNET = {name: shape for name, shape in SHAPES.items() if name.startswith("unet.")}
Q, MLP = f"{LAYERS}.0.self_attn.q_proj", f"{LAYERS}.1.mlp.fc1"
PARTS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "attention": lambda name: "self_attn" in name,
    "mlp": lambda name: "mlp" in name,
    "q": lambda name: "q_proj" in name,
    "q, k and v": lambda name: "self_attn" in name and "out" not in name,
    "out": lambda name: "out_proj" in name,
    "q and mlp": lambda name: "q_proj" in name or "mlp" in name,
    "second layer": lambda name: "layers.1." in name,
    "q of one and mlp of another": lambda name: name in (Q, MLP),
    "fc2 of one": lambda name: name == f"{LAYERS}.1.mlp.fc2",
}


def text_part(part: str) -> list[AdapterModule]:
    return random_adapter({name: shape for name, shape in TEXT.items() if PARTS[part](name)})


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(str(TINY_BASE), dtype=torch.float32)


@pytest.fixture
def loaded(pipeline: Any, tmp_path: Path) -> Iterator[Callable[..., dict[str, nn.Module]]]:
    """Loads modules as written, and gives the models; unloads them at the end."""

    def load(modules: Sequence[AdapterModule], naming: Naming) -> dict[str, nn.Module]:
        (tmp_path / "a.safetensors").write_bytes(raw_bytes(modules, naming))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # peft tells of patterns it ignores
            pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
        return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}

    yield load
    pipeline.unload_lora_weights()


def assert_applied(models: dict[str, nn.Module], modules: Sequence[AdapterModule]) -> None:
    for module in modules:
        layer: Any = layer_at(models[module.name.partition(".")[0]], module.name)
        (name,) = layer.scaling
        halves = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        found, wanted = delta(*halves, layer.scaling[name]), delta(*module.low_rank)
        # Halves folded in float64 and rounded to float32 once each: 2^-24 twice.
        assert_close(found, wanted, rtol=0, atol=2e-7 * float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("part", PARTS)
def test_any_part_of_a_text_encoder_is_applied(
    loaded: Callable[..., dict[str, nn.Module]], part: str, naming: Naming
) -> None:
    modules = text_part(part)
    assert_applied(loaded(readable(modules, naming), naming), modules)


@pytest.mark.slow
@pytest.mark.parametrize("naming", NAMINGS)
def test_a_part_of_a_text_encoder_beside_the_denoiser_is_applied(
    loaded: Callable[..., dict[str, nn.Module]], naming: Naming
) -> None:
    modules = [*random_adapter(UNET), *text_part("q and mlp")]
    assert_applied(loaded(readable(modules, naming), naming), modules)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "naming"), [("q", "kohya"), ("mlp", "diffusers"), ("fc2 of one", "diffusers")]
)
def test_without_completion_diffusers_refuses_some(
    loaded: Callable[..., dict[str, nn.Module]], part: str, naming: Naming
) -> None:
    # The reason for `completed`; when diffusers mends it, this says so.
    with pytest.raises(ValueError, match="Could not automatically infer"):
        loaded(text_part(part), naming)


@pytest.mark.slow
def test_without_completion_diffusers_drops_some_without_a_word(
    loaded: Callable[..., dict[str, nn.Module]],
) -> None:
    models = loaded(text_part("q and mlp"), "kohya")
    assert not hasattr(layer_at(models[Q.partition(".")[0]], Q), "lora_A")


@pytest.mark.slow
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("odd", ["attn1", "ff", "conv", "proj_in", "mlp", "layers.0", "text", ""])
def test_ranks_and_alphas_that_differ_are_applied_as_trained(
    loaded: Callable[..., dict[str, nn.Module]], odd: str, naming: Naming
) -> None:
    modules = [
        random_module(name, shape, rank=2 + index % 3, alpha=3.0 if odd in name else 0.7)
        for index, (name, shape) in enumerate({**UNET, **TEXT}.items())
    ]
    assert_applied(loaded(readable(modules, naming), naming), modules)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("naming", NAMINGS)
def test_completion_adds_one_layer_that_does_nothing_and_only_where_it_is_needed(
    part: str, naming: Naming
) -> None:
    needed = {
        "kohya": {"q", "q, k and v", "q and mlp", "q of one and mlp of another"},
        "diffusers": {"mlp", "fc2 of one"},
    }
    modules = text_part(part)
    found = completed(modules, naming)
    assert found[: len(modules)] == modules
    added = found[len(modules) :]
    assert len(added) == (part in needed[naming])
    for module in added:
        layer = modules[0].name.removeprefix(f"{LAYERS}.").partition(".")[0]
        assert module.name == f"{LAYERS}.{layer}.self_attn.out_proj"
        assert module.tensors[DOWN].shape == (4, 96)
        assert module.tensors[UP].shape == (96, 4)
        assert not module.tensors[DOWN].any()
        assert not module.tensors[UP].any()
        assert (module.rank, module.alpha) == (4, 2.0)


def test_each_clip_is_completed_by_itself_and_t5_is_not() -> None:
    names = [
        "text_encoder.text_model.encoder.layers.10.self_attn.k_proj",
        "text_encoder_2.text_model.encoder.layers.3.self_attn.out_proj",
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
    ]
    added = completed([random_module(name, (8, 8)) for name in names], "kohya")[3:]
    assert [module.name for module in added] == [names[0].replace("k_proj", "out_proj")]


def test_a_denoiser_alone_is_left_as_it_is() -> None:
    modules = random_adapter(UNET)
    for naming in NAMINGS:
        assert readable(modules, naming, alphas=False) == modules
        assert readable(modules, naming) == modules


def test_each_model_gets_the_alpha_of_most_of_its_modules_and_keeps_its_deltas() -> None:
    names = list(UNET)
    modules = [
        random_module(name, UNET[name], rank=3, alpha=alpha)
        for name, alpha in zip(names, (16.0, 16.0, 16.0, 1.0, 32.0, 1.0), strict=True)
    ] + [random_module(name, shape, alpha=5.0) for name, shape in TEXT.items()]
    found = one_alpha(modules)
    assert [module.alpha for module in found] == [16.0] * len(UNET) + [5.0] * len(TEXT)
    for before, after in zip(modules, found, strict=True):
        assert (after is before) == (before.alpha == after.alpha)
        wanted = delta(*before.low_rank)
        assert_close(delta(*after.low_rank), wanted, rtol=1e-15, atol=0)
    # What shrinks is down, what grows is up.
    assert_close(found[3].tensors[DOWN], modules[3].tensors[DOWN].double() / 16, rtol=0, atol=0)
    assert_close(found[4].tensors[UP], modules[4].tensors[UP].double() * 2, rtol=0, atol=0)
    assert found[3].tensors[ALPHA].dtype == torch.float32


def test_the_common_alpha_does_not_depend_on_the_order() -> None:
    modules = [
        random_module(name, shape, alpha=1.0 + index % 2)
        for index, (name, shape) in enumerate(UNET.items())
    ]
    for given in (modules, modules[::-1]):
        assert {module.alpha for module in one_alpha(given)} == {2.0}
