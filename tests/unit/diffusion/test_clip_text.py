"""Captions for CLIP: tokens and weights of sd-scripts, and chunks of 75."""

from __future__ import annotations

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from raylora.diffusion.clip_text import caption_tokens, chunk_captions, weighted_parts

GOLDEN = Path(__file__).parents[2] / "golden"
ROWS: list[dict[str, Any]] = json.loads((GOLDEN / "tokens.json").read_text())["rows"]
BOS, EOS, PAD = 901, 902, 0


class Numbers:
    """A tokenizer for captions of numbers; it pads with another token than the end, as SD 2's."""

    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, PAD

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any:
        assert text
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[[int(word) for word in one.split()] for one in text])


def numbers(count: int) -> str:
    return " ".join(str(i) for i in range(1, count + 1))


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of CLIP-L and so of SD 1.x, made of OpenAI's list of merges."""
    from transformers import CLIPTokenizer

    with gzip.open(
        GOLDEN / "clip_bpe/bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8"
    ) as file:
        merges = file.read().split("\n")[1:48895]
    printed = [*range(ord("!"), 127), *range(ord("¡"), 173), *range(ord("®"), 256)]
    letters = [chr(i) for i in printed] + [chr(256 + i) for i in range(256 - len(printed))]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ("", []),
        ("plain, text: 2", [("plain, text: 2", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("a (cat:1.3)", [("a ", 1), ("cat", 1.3)]),
        ("a (cat:.5) (dog:2.) (ox:-1)", [("a ", 1), ("cat", 0.5), (" ", 1), ("dog", 2), (" ", 1),
                                         ("ox", -1)]),
        ("[grey] cat", [("grey", 1 / 1.1), (" cat", 1)]),
        ("((a)) [[b]]", [("a", 1.21), (" ", 1), ("b", 1 / 1.21)]),
        ("(a [b:2] c:3)", [("a ", 3), ("b:2", 3 / 1.1), (" c", 3)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("(open [wide", [("open ", 1.1), ("wide", 1.1 / 1.1)]),
        ("shut) tight] ever:1.3)", [("shut) tight] ever:1.3)", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 / 1.1), (" c", 1 / 1.1)]),
        (r"\(a\) \[b\] \\ \c", [("(a) [b] \\ c", 1)]),
        (r"(o\):2)", [("o)", 2)]),
        ("(a: 2)", [("a: 2", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(two\nlines:2)", [("two\nlines", 2)]),
        ("()[](:2)", []),
        ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
         [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55),
          (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)]),
    ],
)  # fmt: skip
def test_brackets_weigh_what_is_within(caption: str, parts: list[tuple[str, float]]):
    found = weighted_parts(caption)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


@given(st.text("ab()[]:1é🙂\\ \n"))
def test_a_caption_with_its_brackets_escaped_is_one_text(text: str):
    escaped = re.sub(r"[\\()\[\]]", r"\\\g<0>", text)
    assert weighted_parts(escaped) == ([(text, 1.0)] if text else [])


@given(st.text("ab():[]12.\\ "))
def test_any_caption_can_be_read_and_loses_nothing_but_syntax(caption: str):
    parts = weighted_parts(caption)
    read = iter(caption)
    assert all(letter in read for text, _ in parts for letter in text), "letters came from nowhere"
    assert all(one != other for (_, one), (_, other) in pairwise(parts))
    assert "".join(text for text, _ in parts).count("a") == caption.count("a")


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row['max_token_length']}-{row['caption'][:9]}"
)
def test_tokens_and_weights_are_those_of_sd_scripts(row: dict[str, Any], clip_tokenizer: Any):
    caption, max_tokens = [row["caption"]], row["max_token_length"] or 75
    plain = chunk_captions(clip_tokenizer, caption, max_tokens=max_tokens, weighted=False)
    assert plain.ids_BNT[0].tolist() == row["ids"]
    assert (plain.weights_BNT == 1).all()
    weighted = chunk_captions(clip_tokenizer, caption, max_tokens=max_tokens, weighted=True)
    assert weighted.ids_BNT[0].tolist() == row["weighted_ids"]
    assert_close(weighted.weights_BNT[0], torch.tensor(row["weights"]), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_vocabulary_is_clips(clip_tokenizer: Any):
    assert len(clip_tokenizer) == 49408
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]  # as CLIP's own notebook shows it
    assert clip_tokenizer("a photo of a cat").input_ids == cat


def test_tokens_are_counted_beyond_any_limit():
    counted = caption_tokens(Numbers(), [numbers(400), "", "(1 2:3) 4"], weighted=True)
    assert [len(tokens) for tokens in counted] == [400, 0, 3]
    assert counted[2] == [(1, 3.0), (2, 3.0), (4, 1.0)]
    assert caption_tokens(Numbers(), [], weighted=False) == []
    assert caption_tokens(Numbers(), ["()"], weighted=True) == [[]]


@pytest.mark.parametrize(
    ("count", "chunks"),
    [
        (0, [[BOS, EOS] + [PAD] * 75, [BOS, EOS] + [PAD] * 75]),
        (3, [[BOS, 1, 2, 3, EOS] + [PAD] * 72, [BOS, EOS] + [PAD] * 75]),
        (74, [[BOS, *range(1, 75), EOS, PAD], [BOS, EOS] + [PAD] * 75]),
        (75, [[BOS, *range(1, 76), EOS], [BOS, EOS] + [PAD] * 75]),
        (76, [[BOS, *range(1, 76), EOS], [BOS, 76, EOS] + [PAD] * 74]),
        (150, [[BOS, *range(1, 76), EOS], [BOS, *range(76, 151), EOS]]),
        (400, [[BOS, *range(1, 76), EOS], [BOS, *range(76, 151), EOS]]),
    ],
)
def test_every_chunk_begins_and_ends_as_clip_expects(count: int, chunks: list[list[int]]):
    cut = chunk_captions(Numbers(), [numbers(count), "7"], max_tokens=150, weighted=False)
    assert cut.ids_BNT[0].tolist() == chunks
    assert cut.ids_BNT[1, 0, :4].tolist() == [BOS, 7, EOS, PAD]


def test_weights_stay_with_their_tokens_across_chunks():
    cut = chunk_captions(Numbers(), [f"{numbers(70)} ({numbers(9)}:2) 5"], max_tokens=150,
                         weighted=True)  # fmt: skip
    heavy = (cut.weights_BNT[0] == 2).nonzero().tolist()
    assert heavy == [[0, i] for i in range(71, 76)] + [[1, i] for i in range(1, 5)]
    assert ((cut.weights_BNT == 1) | (cut.weights_BNT == 2)).all()
    assert cut.ids_BNT[0, 1, :7].tolist() == [BOS, 6, 7, 8, 9, 5, EOS]
