"""Encoders and the VAE of every family visit the device one at a time, and change no bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from bases import open_tiny
from numpy.typing import NDArray
from torch import Tensor, nn
from true_configs import Configured

from raylora.base.lookup import plugins
from raylora.components import cache_encoder, vae
from raylora.components.cache_encoder import CacheEncoder
from raylora.components.lent import Keeps, Lender
from raylora.components.t5 import load_t5, read_t5, t5_units
from raylora.components.texts import read_batches
from raylora.components.vae import Tiling
from raylora.families import Family
from raylora.memory.host import lies_on_host
from raylora.memory.lending import lending_of
from raylora.memory.options import MemoryOptions
from raylora.memory.placed import Placed
from raylora.memory.setting import Setting
from raylora.memory.tracker import PeakTracker

KINDS = plugins("raylora.families")
CPU = torch.device("cpu")
every_kind = pytest.mark.parametrize("kind", KINDS)
CAPTIONS = [["ink icon, cat", ""], ["a dog", "a red house by the sea"], ["cat"]]
PIXELS = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 48)).astype(np.float32)
Encoded = list[dict[str, NDArray[Any]]]


@cache
def opened(kind: str) -> Family:
    return open_tiny(kind)


def encoded(encoder: CacheEncoder) -> Encoded:
    """Pictures, captions, and pictures again."""
    return [
        encoder.encode_images(PIXELS),
        *encoder.encode_batches(CAPTIONS),
        encoder.encode_images(PIXELS[:1]),
    ]


@cache
def plain(kind: str) -> Encoded:
    """All models in their place, each text through all encoders at once."""
    family = opened(kind)
    found = encoded(family.load_encoder(device=CPU))
    encoders = family.load_text_encoders(dtype=torch.float32, device=CPU)
    for captions, said in zip(CAPTIONS, found[1:-1], strict=True):
        tokens = {word: torch.from_numpy(held) for word, held in family.tokens(captions).items()}
        with torch.no_grad():
            expected = family.read_tokens(encoders, tokens)
        assert expected.keys() == said.keys()
        assert all(np.array_equal(said[word], held) for word, held in expected.items())
    return found


def assert_same(found: Encoded, expected: Encoded) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for word, array in one.items():
            assert array.dtype == other[word].dtype
            assert np.array_equal(array, other[word]), word


def lent(family: Family, free: float = float("inf")) -> Any:
    """What lends a family's models where so much is free."""
    lending = lending_of(family, MemoryOptions(reserve_gib=0), CPU)
    lending._free_bytes = lambda: free
    return lending


class Present:
    """Which of a family's loaded models have weights on the device."""

    def __init__(self, family: Family, patch: pytest.MonkeyPatch) -> None:
        self._loaded: list[tuple[str, weakref.ref[nn.Module]]] = []
        self.seen: list[tuple[str, list[str]]] = []
        load_text = family.load_text_encoder

        def text_encoder(component: str, **words: Any) -> nn.Module:
            return self._note(component, load_text(component, **words))

        def note_vae(given: Any, **words: Any) -> nn.Module:
            return self._note("vae", vae.load_vae(given, **words))

        patch.setattr(family, "load_text_encoder", text_encoder)
        patch.setattr("raylora.families.load_vae", note_vae)

    def _note(self, component: str, model: nn.Module) -> nn.Module:
        self._loaded.append((component, weakref.ref(model)))
        return model

    def now(self) -> list[str]:
        return sorted(name for name, held in self._loaded if self._weighs(held()))

    def _weighs(self, model: nn.Module | None) -> bool:
        if model is None:
            return False
        weights = [weight for weight in model.parameters() if not weight.is_meta]
        return any(not lies_on_host(weight.untyped_storage()) for weight in weights)

    def watch(self, patch: pytest.MonkeyPatch, holder: Any, name: str, called: str) -> None:
        """Note who is there whenever a function is called; `called` names it."""
        own = getattr(holder, name)

        def watched(*inputs: Any, **words: Any) -> Any:
            told = inputs[0] if called == "text" else called
            self.seen.append((told, self.now()))
            return own(*inputs, **words)

        patch.setattr(holder, name, watched)


@pytest.mark.slow
@every_kind
def test_one_model_is_on_the_device_while_it_is_needed(kind: str, monkeypatch: Any):
    family, expected = open_tiny(kind), plain(kind)
    there = Present(family, monkeypatch)
    there.watch(monkeypatch, cache_encoder, "encode_pixels", "vae")
    there.watch(monkeypatch, family, "read_text", "text")
    gc.disable()  # nothing waits for it
    try:
        lender = lent(family)
        assert_same(encoded(family.load_encoder(device=CPU, lender=lender)), expected)
        each = [(one, [one]) for one in family.text_components for _ in CAPTIONS]
        assert there.seen == [("vae", ["vae"]), *each, ("vae", ["vae"])]
        lender.close()
        assert there.now() == []
    finally:
        gc.enable()


@every_kind
def test_encoders_that_are_streamed_give_the_same_bits(kind: str):
    family = opened(kind)
    lender, streamed = lent(family, free=0), []
    bring = lender._bring

    def noted(component: str, *words: Any) -> Any:
        visitor = bring(component, *words)
        streamed.append((component, visitor.placed and len(visitor.placed.streamed)))
        return visitor

    lender._bring = noted
    assert_same(encoded(family.load_encoder(device=CPU, lender=lender)), plain(kind))
    lender.close()
    units = family.text_units(family.load_text_encoders(dtype=torch.float32, device=CPU))
    each = [(one, len(units[one])) for one in family.text_components]
    assert streamed == [("vae", None), *each, ("vae", None)]


@every_kind
def test_encoders_of_a_batch_that_does_not_fit_read_it_in_halves(kind: str, monkeypatch: Any):
    family = open_tiny(kind)
    sizes: list[int] = []
    read = family.read_text

    def small(component: str, encoder: Any, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        count = len(next(iter(tokens.values())))
        sizes.append(count)
        if count > 2:
            raise torch.OutOfMemoryError("full")
        return read(component, encoder, tokens)

    monkeypatch.setattr(family, "read_text", small)
    many = ["a cat", "", "a dog", "a house", "cat"]
    found = family.load_encoder(device=CPU).encode_texts(many)
    expected = opened(kind).load_encoder(device=CPU).encode_texts(many)
    assert sizes == [5, 2, 3, 1, 2] * len(family.text_components)
    for word, array in expected.items():
        # Batches of other sizes may sum in another order.
        assert np.allclose(found[word], array, rtol=0, atol=1e-4)


@pytest.mark.slow
@every_kind
def test_fewer_bytes_are_held_at_most_than_with_all_models_there(kind: str):
    family, expected = opened(kind), plain(kind)
    peaks = []
    for keep in (True, False):
        budget = PeakTracker()
        lender = lending_of(family, MemoryOptions(reserve_gib=0), CPU, keep=keep, budget=budget)
        with budget:
            assert_same(encoded(family.load_encoder(device=CPU, lender=lender)), expected)
        lender.close()
        peaks.append(budget.peak_bytes)
        assert budget.now_bytes == 0
    together, alone = peaks
    assert alone < together - 2**18, "an encoder of every tiny base is larger than that"


class OneT5:
    """Reads with a T5 of which the blocks are nearly all."""

    text_components = ("text_encoder",)
    text_bytes = 16 * 64 * 4

    def __init__(self) -> None:
        from transformers import T5Config, T5EncoderModel

        config = {
            "d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 12,
            "vocab_size": 50, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False,
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = T5EncoderModel(T5Config.from_dict(config)).state_dict()
        self.base: Any = Configured({"text_encoder": config})
        self.base.weights = lambda component: weights
        self.weights_bytes = sum(weight.nbytes for weight in weights.values())

    def tokens(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        rows = [[(7 * i + len(caption)) % 50 for i in range(16)] for caption in captions]
        return {"ids": np.array(rows, np.int64)}

    def load_text_encoder(self, component: str, **words: Any) -> nn.Module:
        return load_t5(self.base, component, **words)

    def read_text(self, component: str, encoder: Any, tokens: Any) -> dict[str, Tensor]:
        return {"text": read_t5(encoder, tokens["ids"])}

    def join_texts(self, said: Any, tokens: Any) -> dict[str, Tensor]:
        return dict(said["text_encoder"])

    def text_units(self, encoders: Any) -> Any:
        return {one: t5_units(one, encoder) for one, encoder in encoders.items()}


def test_a_t5_larger_than_its_budget_reads_within_it_and_gives_the_same_bits():
    family: Any = OneT5()
    captions = [["a cat", ""], ["a dog", "a house"]]

    def read(lender: Lender) -> list[Tensor]:
        found = read_batches(family, captions, lender, dtype=torch.float32)
        return [one["text"].clone() for one in found]

    expected = read(Keeps(CPU))
    budget = PeakTracker(limit_bytes=family.weights_bytes // 2)
    lender = lending_of(family, MemoryOptions(reserve_gib=0), CPU, budget=budget)
    with budget:
        found = read(lender)
    lender.close()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert family.weights_bytes // 4 < budget.peak_bytes <= family.weights_bytes // 2


# -- previews

SIDE = 8  # in latents
PROMPTS = ["ink icon, cat", "a dog", "ink icon, cat"]


def renderer_of(family: Family, denoiser: nn.Module, **words: Any) -> Any:
    return family.load_renderer(denoiser, dtype=torch.float32, device=CPU, **words)


def drawn(family: Family, renderer: Any, *, guidance: float = 3.0) -> list[NDArray[np.uint8]]:
    side = max(SIDE, 2 * family.size_step // family.pixels_per_latent)
    latents = torch.linspace(-2, 2, family.latent_channels * side * side).sin()
    return [
        renderer.render(
            prompt,
            negative="red",
            latents=latents.view(1, -1, side, side),
            steps=2,
            guidance=guidance,
            sampler=family.usual_sampler,
            process=family.process,
            embedded_guidance=family.usual_embedded_guidance,
        )
        for prompt in PROMPTS
    ]


@cache
def pictures(kind: str) -> list[NDArray[np.uint8]]:
    family = opened(kind)
    denoiser = family.load_denoiser(dtype=torch.float32, device=CPU)
    encoders = family.load_text_encoders(dtype=torch.float32, device=CPU)
    return drawn(family, renderer_of(family, denoiser, text_encoders=encoders))


@pytest.mark.slow
@every_kind
def test_a_picture_is_the_same_whatever_comes_and_goes_or_is_streamed(kind: str):
    family, expected = opened(kind), pictures(kind)
    assert not np.array_equal(expected[0], expected[1])
    for free, streamed in ((float("inf"), 0.0), (0.0, 0.0), (0.0, 1.0)):
        denoiser = family.load_denoiser(dtype=torch.float32, device=CPU)
        placed = Placed(denoiser, family.units(denoiser), device=CPU)
        placed.apply(Setting(streamed=streamed))
        assert len(placed.streamed) == streamed * len(placed.units)
        lender = lent(family, free)
        found = drawn(family, renderer_of(family, denoiser, lender=lender))
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
        placed.close()


@pytest.mark.slow
@every_kind
def test_a_preview_has_text_encoders_once_and_the_vae_after_denoising(kind: str, monkeypatch: Any):
    pictures(kind)
    family = open_tiny(kind)
    there = Present(family, monkeypatch)
    denoiser = family.load_denoiser(dtype=torch.float32, device=CPU)
    renderer = renderer_of(family, denoiser, lender=lent(family))
    there.watch(monkeypatch, family, "read_text", "text")
    there.watch(monkeypatch, denoiser, "forward", "denoiser")
    there.watch(monkeypatch, vae, "decode_whole", "vae")
    gc.disable()  # nothing waits for it
    try:
        renderer.read([*PROMPTS, "red"])
        assert there.now() == []
        drawn(family, renderer)
    finally:
        gc.enable()
    texts = [(one, [one]) for one in family.text_components for _ in ("cat", "dog", "red")]
    assert there.seen[: len(texts)] == texts
    rest = there.seen[len(texts) :]
    assert {(word, tuple(now)) for word, now in rest} == {("denoiser", ()), ("vae", ("vae",))}
    assert [word for word, _ in rest].count("vae") == len(PROMPTS)
    assert there.now() == []


@pytest.mark.slow
@every_kind
def test_text_encoders_that_are_trained_read_a_prompt_whenever_it_is_drawn(kind: str):
    family, expected = opened(kind), pictures(kind)
    denoiser = family.load_denoiser(dtype=torch.float32, device=CPU)
    encoders = family.load_text_encoders(dtype=torch.float32, device=CPU)
    renderer = renderer_of(family, denoiser, text_encoders=encoders, lender=lent(family))
    renderer.read(PROMPTS)
    assert np.array_equal(drawn(family, renderer)[0], expected[0])
    with torch.no_grad():
        for encoder in encoders.values():
            for weight in encoder.parameters():
                weight *= 1.2
    assert not np.array_equal(drawn(family, renderer)[0], expected[0])


@pytest.mark.slow
def test_tiles_are_taken_where_a_whole_picture_would_not_fit(monkeypatch: Any):
    family, expected = opened("sdxl"), pictures("sdxl")
    denoiser = family.load_denoiser(dtype=torch.float32, device=CPU)
    in_tiles: list[bool] = []
    own = vae.decode_in_tiles

    def small_tiles(model: Any, scaled: Tensor) -> Tensor:
        in_tiles.append(True)
        return own(model, scaled, tile=8)

    monkeypatch.setattr(vae, "decode_in_tiles", small_tiles)
    needed = vae.whole_bytes(
        family.base.config("vae")["block_out_channels"],
        torch.empty(1, family.latent_channels, *(side // 2 for side in expected[0].shape[:2])),
    )
    for mode, free, tiled in (
        (False, 0, False), (True, float("inf"), True),
        ("auto", needed, False), ("auto", needed - 1, True),
    ):  # fmt: skip
        in_tiles.clear()
        tiling = Tiling(mode, lambda free=free: free)
        found = drawn(family, renderer_of(family, denoiser, tiling=tiling))
        assert bool(in_tiles) is tiled, (mode, free)
        assert np.array_equal(found[0], expected[0]) is not tiled
