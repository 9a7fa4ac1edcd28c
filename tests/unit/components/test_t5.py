"""T5 text encoders: filled from a base, their layers, and captions of one length."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from bases import random_folder
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoTokenizer, T5EncoderModel

from raylora.base.errors import WeightsError
from raylora.base.site import Place
from raylora.components.t5 import (
    count_caption_tokens,
    empty_t5,
    load_t5,
    padded_tokens,
    read_t5,
    t5_place,
    t5_sites,
)
from raylora.weights.base import Base, open_base

CPU = torch.device("cpu")
T5 = "text_encoder_2"


@cache
def base() -> Base:
    return open_base(str(random_folder("flux1")), kind="flux1")


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(random_folder("flux1") / "tokenizer_2")


class Renamed:
    """The same base, with other names in its file, or with others beside them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.config, self._names = base().config, names

    def weights(self, component: str) -> dict[str, Tensor]:
        held = dict(base().weights(component))
        shared = held.pop("shared.weight")
        held.pop("encoder.embed_tokens.weight", None)
        beside = {"decoder.final_layer_norm.weight": torch.ones(32)}
        return {**held, **beside, **dict.fromkeys(self._names, shared)}


def read(encoder: Any) -> Tensor:
    ids, _ = padded_tokens(tokenizer(), ["ink icon, cat", ""], 20)
    with torch.no_grad():
        return read_t5(encoder, torch.from_numpy(ids))


@pytest.mark.parametrize(
    "names",
    [
        ("shared.weight",),
        ("encoder.embed_tokens.weight",),
        ("shared.weight", "encoder.embed_tokens.weight"),
    ],
)
def test_one_table_of_embeddings_is_read_under_either_name(names: tuple[str, ...]):
    ours: Any = load_t5(Renamed(names), T5, dtype=torch.float32, device=CPU)  # type: ignore[arg-type]
    plain = T5EncoderModel.from_pretrained(random_folder("flux1") / T5, dtype=torch.float32)
    assert torch.equal(read(ours), read(plain.eval()))
    assert ours.encoder.embed_tokens is ours.shared
    assert not any(weight.requires_grad or weight.is_meta for weight in ours.parameters())


def test_a_file_without_embeddings_is_refused():
    with pytest.raises(WeightsError, match=r"shared\.weight"):
        load_t5(Renamed(()), T5, dtype=torch.float32, device=CPU)  # type: ignore[arg-type]


def test_it_drops_nothing_in_training_which_checkpointing_needs():
    encoder = load_t5(base(), T5, dtype=torch.float32, device=CPU)
    before = read(encoder)
    assert torch.equal(read(encoder.train()), before)


def test_in_float16_the_layers_that_overflow_stay_in_float32():
    encoder = load_t5(base(), T5, dtype=torch.float16, device=CPU)
    wide = {name for name, held in encoder.named_parameters() if held.dtype == torch.float32}
    assert wide == {f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(2)}
    found = read(encoder)
    assert found.dtype == torch.float16
    exact = read(load_t5(base(), T5, dtype=torch.float32, device=CPU))
    assert_close(found.float(), exact, rtol=0, atol=0.05)  # 11 bits, through two layers


def test_sites_are_every_layer_of_its_blocks():
    sites = t5_sites(T5, empty_t5(base(), T5))
    attention = [f"SelfAttention.{one}" for one in "qkvo"]
    mlp = [f"DenseReluDense.{one}" for one in ("wi_0", "wi_1", "wo")]
    assert [site.name for site in sites] == [
        f"{T5}.encoder.{path}"
        for path in (
            *(
                f"block.{i}.layer.{j}.{one}"
                for i in range(2)
                for j, layers in ((0, [*attention, "layer_norm"]), (1, [*mlp, "layer_norm"]))
                for one in layers
            ),
            "final_layer_norm",
        )
    ]
    roles = [site.role for site in sites]
    assert (roles.count("attention"), roles.count("mlp"), roles.count("norm")) == (8, 6, 5)
    assert {site.section for site in sites} == {"text"}
    assert [site.number for site in sites] == [0] * 9 + [1] * 9 + [2]
    out = next(site for site in sites if site.name.endswith("0.layer.1.DenseReluDense.wo"))
    assert (out.kind, out.inputs, out.outputs) == ("linear", 37, 32)


def test_its_place_is_its_own_path():
    place = t5_place("text_encoder_3.encoder.block.7.layer.0.SelfAttention.q", "lora_te3")
    assert place == Place("lora_te3", "encoder.block.7.layer.0.SelfAttention.q")
    assert place.kohya == "lora_te3_encoder_block_7_layer_0_SelfAttention_q"


def test_a_library_that_builds_other_layers_is_told():
    encoder: Any = empty_t5(base(), T5)
    del encoder.encoder.block[1].layer[1].DenseReluDense.wi_1
    with pytest.raises(WeightsError, match=r"T5 text encoder has 13 layers .* means 14"):
        t5_sites(T5, encoder)


def test_captions_are_cut_or_padded_and_end_with_the_last_token():
    captions = ["ink icon, cat", "", ", ".join(["ink icon"] * 40)]
    counts = count_caption_tokens(tokenizer(), captions)
    ids, mask = padded_tokens(tokenizer(), captions, 20)
    assert ids.shape == mask.shape == (3, 20)
    assert counts[1] == 0 < counts[0] < 19 < counts[2]
    assert mask.sum(1).tolist() == [counts[0] + 1, 1, 20]
    ends = [row[number.sum() - 1] for row, number in zip(ids, mask, strict=True)]
    assert ends == [tokenizer().eos_token_id] * 3
    assert (ids[mask == 0] == tokenizer().pad_token_id).all()
    assert count_caption_tokens(tokenizer(), []) == []
