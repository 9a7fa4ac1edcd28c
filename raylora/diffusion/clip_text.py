"""Captions for CLIP text encoders: over 75 tokens, weights within a caption, clip skip.

CLIP reads 77 tokens at once: a first one, 75 of the caption, and a last one. A longer caption is
cut into chunks of 75, each is read by itself, and what comes out is joined. Tokens, weights and
embeddings are those of sd-scripts (`max_token_length`, `weighted_captions`, `clip_skip`).

Dimension letters besides the usual: `N` chunks of a caption.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK = 75
"""Tokens of a caption that CLIP reads at once, without the first and the last."""


class Tokenizer(Protocol):
    """What is used of a CLIP tokenizer of transformers."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any:
        """Something with `input_ids`: a list of tokens for each text."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """B captions as CLIP reads them; all have the same number of chunks."""

    ids_BNT: Tensor
    """(B, N, 77) int64: first token, 75 of the caption, last token; short ones are padded."""
    weights_BNT: Tensor
    """(B, N, 77) float32; 1 at the ends of a chunk, at the end of a caption and in the padding."""


_SYNTAX = re.compile(
    r"\\(?P<escaped>[\\()\[\]]?)"
    r"|(?P<opens>[(\[])"
    r"|(?::(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))(?=\)))?(?P<closes>[)\]])"
    r"|(?P<text>.)",
    re.DOTALL,
)
_FACTORS = {")": 1.1, "]": 1 / 1.1}


def weighted_parts(caption: str) -> list[tuple[str, float]]:
    r"""Take the web UI's syntax of weights out of a caption.

    `(x)` weighs 1.1, `(x:1.3)` weighs 1.3 and `[x]` 1 / 1.1; within one another they multiply.
    `\(`, `\)`, `\[`, `\]` and `\\` are plain characters; any other backslash goes. A bracket left
    open reaches to the end, one that closes nothing is plain text.

    Returns:
        The text in pieces of one weight each, in order; none for an empty caption.

    Source: the rules of AUTOMATIC1111's web UI, as sd-scripts reads them.
    """
    letters: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {")": [], "]": []}

    def weigh_from(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for found in _SYNTAX.finditer(caption):
        closes = found["closes"]
        if found["opens"]:
            opened[")" if found["opens"] == "(" else "]"].append(len(letters))
        elif closes and opened[closes]:
            factor = float(found["weight"]) if found["weight"] else _FACTORS[closes]
            weigh_from(opened[closes].pop(), factor)
        else:
            text = found.group() if found["escaped"] is None else found["escaped"]
            letters += text
            weights += [1.0] * len(text)
    for closes, starts in opened.items():
        for start in starts:
            weigh_from(start, _FACTORS[closes])
    runs = groupby(zip(letters, weights, strict=True), key=itemgetter(1))
    return [("".join(letter for letter, _ in run), weight) for weight, run in runs]


def caption_tokens(
    tokenizer: Tokenizer, captions: Sequence[str], *, weighted: bool
) -> list[list[tuple[int, float]]]:
    """All tokens of each caption with their weights: nothing cut off, no first and last token.

    Args:
        weighted: read the syntax of `weighted_parts`; off, captions are plain text.
    """
    parts = [weighted_parts(text) if weighted else [(text, 1.0)] for text in captions]
    texts = [text for caption in parts for text, _ in caption]
    # A tokenizer refuses an empty list; `verbose` would warn of every caption over 77 tokens.
    ids = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    of_texts = iter(ids)
    return [
        [(token, weight) for _, weight in caption for token in next(of_texts)] for caption in parts
    ]


def chunk_captions(
    tokenizer: Tokenizer, captions: Sequence[str], *, max_tokens: int, weighted: bool
) -> Chunks:
    """Captions cut after `max_tokens`, a multiple of 75, and put into chunks as CLIP reads them."""
    width = CHUNK + 2
    rows_ids, rows_weights = [], []
    for tokens in caption_tokens(tokenizer, captions, weighted=weighted):
        ids, weights = [], []
        for start in range(0, max_tokens, CHUNK):
            body = tokens[start : start + CHUNK]
            read = [tokenizer.bos_token_id, *(token for token, _ in body), tokenizer.eos_token_id]
            ids.append(read + [tokenizer.pad_token_id] * (width - len(read)))
            weights.append([1.0, *(weight for _, weight in body), *[1.0] * (width - 1 - len(body))])
        rows_ids.append(ids)
        rows_weights.append(weights)
    return Chunks(torch.tensor(rows_ids), torch.tensor(rows_weights, dtype=torch.float32))


def join_chunks(hidden_BNTD: Tensor, chunks: Chunks) -> Tensor:
    """The chunks' hidden states, weighted and joined.

    Returns:
        (B, 75 N + 2, D) in their dtype: the first chunk's first token, the middles of all chunks,
        the last chunk's last token.
    """
    weights_BNT = chunks.weights_BNT.to(hidden_BNTD.device, non_blocking=True)
    weighted_BNTD = (hidden_BNTD * weights_BNT[..., None]).to(hidden_BNTD.dtype)
    middles = weighted_BNTD[:, :, 1:-1].flatten(1, 2)
    return torch.cat([weighted_BNTD[:, 0, :1], middles, weighted_BNTD[:, -1, -1:]], dim=1)
