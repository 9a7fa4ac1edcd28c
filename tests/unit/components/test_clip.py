"""CLIP text encoders: read chunk by chunk, loaded with and without a level, and their layers."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from true_configs import CLIP_BIG_G, CLIP_H, CLIP_L, Configured

from raylora.base.errors import WeightsError
from raylora.base.site import Place
from raylora.components.clip import clip_place, clip_sites, empty_clip, load_clip, read_clip
from raylora.diffusion.clip_text import Chunks, chunk_captions

BOS, EOS, PAD = 901, 902, 0
CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 903,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "projection_dim": 8,
}


class Numbers:
    """A tokenizer for captions of numbers; it pads with another token than the end, as SD 2's."""

    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, PAD

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[[int(word) for word in one.split()] for one in text])


def numbers(count: int) -> str:
    return " ".join(str(i) for i in range(1, count + 1))


def made(*, projected: bool) -> Any:
    """A CLIP of four layers with random weights, by transformers alone."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(
            CLIPTextConfig(**TINY)
        )
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def encoder() -> Any:
    return made(projected=False)


def states_by_hand(encoder: Any, ids: Tensor, skipped: int, *, normed: bool) -> Tensor:
    """CLIP without its last layers: what is left, with or without the final norm."""
    kept, norm = encoder.encoder.layers, encoder.final_layer_norm
    encoder.encoder.layers = kept[: len(kept) - skipped]
    if not normed:
        encoder.final_layer_norm = nn.Identity()
    states: Tensor = encoder(ids).last_hidden_state
    encoder.encoder.layers, encoder.final_layer_norm = kept, norm
    return states


@pytest.mark.slow
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("skip", [1, 2, 4])
@pytest.mark.parametrize("max_tokens", [75, 225])
def test_chunks_are_read_one_by_one_and_joined(
    encoder: Any, max_tokens: int, skip: int, normed: bool
):
    captions = [numbers(210), numbers(8), f"{numbers(80)} (9:3) [10]"]
    chunks = chunk_captions(Numbers(), captions, max_tokens=max_tokens, weighted=True)
    found = read_clip(encoder, chunks, skip=skip, normed=normed).hidden_BTD
    assert found.shape == (3, max_tokens + 2, 16)
    for caption, ids, weights in zip(found, chunks.ids_BNT, chunks.weights_BNT, strict=True):
        joined = []
        for i, (row, factors) in enumerate(zip(ids, weights, strict=True)):
            states = states_by_hand(encoder, row[None], skip - 1, normed=normed)[0]
            states = states * factors[:, None]
            joined += [states[:1]] if i == 0 else []
            joined += [states[1:76]] + ([states[76:]] if i == len(ids) - 1 else [])
        assert_close(caption, torch.cat(joined), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_up_to_75_tokens_nothing_is_done_to_the_encoders_numbers(encoder: Any):
    chunks = chunk_captions(Numbers(), [numbers(75), "3"], max_tokens=75, weighted=False)
    found = read_clip(encoder, chunks, skip=1, normed=True).hidden_BTD
    expected = encoder(chunks.ids_BNT[:, 0]).last_hidden_state
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.slow
def test_weights_do_not_change_the_dtype(encoder: Any):
    half = deepcopy(encoder).to(torch.bfloat16)
    chunks = chunk_captions(Numbers(), ["(3:1.5)"], max_tokens=75, weighted=True)
    heavy = read_clip(half, chunks, skip=1, normed=True).hidden_BTD
    ones = torch.ones_like(chunks.weights_BNT)
    plain = read_clip(half, Chunks(chunks.ids_BNT, ones), skip=1, normed=True).hidden_BTD
    assert heavy.dtype == torch.bfloat16
    assert_close(heavy[:, 1], (plain[:, 1].float() * 1.5).bfloat16(), rtol=0, atol=0)
    assert_close(heavy[:, 2:], plain[:, 2:], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("normed", [True, False])
def test_a_text_model_within_another_says_the_same(encoder: Any, normed: bool):
    outer = made(projected=True)
    outer.text_model.load_state_dict(encoder.state_dict())
    chunks = chunk_captions(Numbers(), ["1 2"], max_tokens=75, weighted=False)
    found, expected = (
        read_clip(one, chunks, skip=2, normed=normed).hidden_BTD for one in (outer, encoder)
    )
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("projected", [True, False])
def test_the_pooled_state_is_the_first_chunks_last_token_unweighted(projected: bool):
    model = made(projected=projected)
    captions = ["(5:2) 6", numbers(150)]
    chunks = chunk_captions(Numbers(), captions, max_tokens=150, weighted=True)
    found = read_clip(model, chunks, skip=2, normed=False).pooled_BD
    inner = model.text_model if projected else model
    last = [inner(ids[None]).last_hidden_state[0] for ids in chunks.ids_BNT[:, 0]]
    expected = torch.stack([last[0][3], last[1][76]])
    if projected:
        expected = expected @ model.text_projection.weight.T
    assert_close(found, expected, rtol=0, atol=1e-6)


class Weighted(Configured):
    """A text encoder with weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__({"text_encoder": TINY})
        self._weights = weights

    def weights(self, component: str) -> dict[str, Tensor]:
        assert component == "text_encoder"
        return self._weights


@pytest.mark.slow
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("level", [True, False])
def test_files_of_either_naming_are_loaded(projected: bool, level: bool):
    theirs = made(projected=projected)
    weights = {
        (
            name if name.startswith("text_projection") else f"text_model.{name}" if level else name
        ): held
        for name, held in (
            (name.removeprefix("text_model."), held) for name, held in theirs.state_dict().items()
        )
    }
    old = {**weights, "text_model.embeddings.position_ids": torch.arange(77)[None]}
    ours = load_clip(
        Weighted(old), "text_encoder", projected=projected, dtype=torch.float64, device=CPU
    )
    assert not ours.training
    assert not any(held.is_meta for held in [*ours.parameters(), *ours.buffers()])
    assert not any(weight.requires_grad for weight in ours.parameters())
    chunks = chunk_captions(Numbers(), ["1 2", numbers(70)], max_tokens=75, weighted=False)
    found = read_clip(ours, chunks, skip=1, normed=True)
    expected = read_clip(theirs.double(), chunks, skip=1, normed=True)
    assert found.hidden_BTD.dtype == torch.float64
    assert_close(found.hidden_BTD, expected.hidden_BTD, rtol=0, atol=1e-12)
    assert_close(found.pooled_BD, expected.pooled_BD, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "projected", "count"),
    [(CLIP_L, False, 72), (CLIP_L, True, 72), (CLIP_H, False, 138), (CLIP_BIG_G, True, 192)],
)
def test_its_linears_are_those_of_its_layers(config: dict[str, Any], projected: bool, count: int):
    model = empty_clip(Configured({"one": config}), "one", projected=projected)
    sites = clip_sites("text_encoder_2", model)
    linears = [site for site in sites if site.kind == "linear"]
    layers = config["num_hidden_layers"]
    assert len(linears) == count
    assert [site.name for site in linears] == [
        f"text_encoder_2.text_model.encoder.layers.{layer}.{path}"
        for layer in range(layers)
        for path in (
            "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj",
            "mlp.fc1", "mlp.fc2",
        )
    ]  # fmt: skip
    assert [site.role for site in linears] == (["attention"] * 4 + ["mlp"] * 2) * layers
    assert [site.number for site in linears] == [i for i in range(layers) for _ in range(6)]
    assert {site.section for site in sites} == {"text"}
    assert {site.block for site in sites} == {None}
    assert sum(site.kind == "norm" for site in sites) == 2 * layers + 1
    assert {site.inputs for site in sites if site.kind == "norm"} == {config["hidden_size"]}


def test_a_text_encoder_without_a_layer_is_noticed(encoder: Any):
    broken = deepcopy(encoder)
    broken.encoder.layers[0].mlp.fc1 = nn.Identity()
    with pytest.raises(WeightsError, match="has 23 layers to train, and its config means 24"):
        clip_sites("text_encoder", broken)


def test_kohyas_name_has_the_level_and_the_prefix():
    name = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    found = clip_place(name, "lora_te2")
    assert found == Place("lora_te2", "text_model.encoder.layers.0.self_attn.q_proj")
    assert found.kohya == "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"


def test_it_drops_nothing_in_training_which_checkpointing_needs():
    base = Configured({"text_encoder": {**TINY, "attention_dropout": 0.5}})
    clip: Any = empty_clip(base, "text_encoder").to_empty(device=CPU)
    clip.load_state_dict(made(projected=False).state_dict())
    for module in clip.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    ids = torch.tensor([[BOS, 1, 2, 3, EOS]])
    with torch.no_grad():
        before = clip(ids).last_hidden_state
        assert torch.equal(clip.train()(ids).last_hidden_state, before)
