"""Captions and prompts through a family's text encoders, one encoder after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylora.components.lent import Lender
from raylora.diffusion.halving import in_halves
from raylora.weights.base import Base

Conditions = dict[str, Tensor]
"""What a denoiser is told of texts, each with B first."""
_HOST_BYTES = 2**30
"""What the encoders say of texts waits on the host for the last of them; at most so much."""


class Texts(Protocol):
    """What a family has for whoever reads texts (`raylora.families.Family`)."""

    @property
    def base(self) -> Base:
        """Whose configs tell the sizes of the encoders."""

    @property
    def text_components(self) -> tuple[str, ...]:
        """The text encoders' names, in the order in which they read."""

    @property
    def text_bytes(self) -> int:
        """Size of the conditions of one text, in float32."""

    def tokens(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        """What the encoders read of texts."""

    def load_text_encoder(
        self, component: str, *, dtype: torch.dtype, device: torch.device
    ) -> nn.Module:
        """One of them."""

    def read_text(
        self, component: str, encoder: nn.Module, tokens: Mapping[str, Tensor]
    ) -> Conditions:
        """What one of them says."""

    def join_texts(
        self, said: Mapping[str, Mapping[str, Tensor]], tokens: Mapping[str, Tensor]
    ) -> Conditions:
        """What all of them say together."""


def read_batches(
    family: Texts, batches: Sequence[Sequence[str]], lender: Lender, *, dtype: torch.dtype
) -> Iterator[Conditions]:
    """The conditions of each batch of texts, on the CPU.

    An encoder reads many batches before the next one is lent. Each batch goes through it alone, as
    if there were no other: out of memory, in halves.

    Args:
        dtype: of the encoders, and so of what they say.
    """
    largest = max((len(batch) for batch in batches), default=1)
    together = max(1, _HOST_BYTES // (family.text_bytes * largest))
    for start in range(0, len(batches), together):
        yield from _read_some(family, batches[start : start + together], lender, dtype)


@torch.no_grad()
def _read_some(
    family: Texts, batches: Sequence[Sequence[str]], lender: Lender, dtype: torch.dtype
) -> list[Conditions]:
    tokens = [
        {word: torch.from_numpy(held) for word, held in family.tokens(batch).items()}
        for batch in batches
    ]
    said: list[dict[str, Conditions]] = [{} for _ in batches]
    for component in family.text_components:
        load = partial(_load, family, component, dtype)
        ids = tokens[0][f"ids{component.removeprefix('text_encoder')}"]
        work = reading_bytes(family.base.config(component), ids.shape, dtype.itemsize)
        with lender.lend(component, load, work_bytes=work) as encoder:
            for texts, given in zip(said, tokens, strict=True):
                texts[component] = _read(family, component, encoder, given, lender)
    return [family.join_texts(texts, given) for texts, given in zip(said, tokens, strict=True)]


def _load(family: Texts, component: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return family.load_text_encoder(component, dtype=dtype, device=device)


def _read(
    family: Texts,
    component: str,
    encoder: nn.Module,
    tokens: Mapping[str, Tensor],
    lender: Lender,
) -> Conditions:
    """What an encoder says of a batch, on the host."""

    def aside(said: Conditions) -> Conditions:
        return {word: lender.aside(held) for word, held in said.items()}

    def joined(parts: Sequence[Conditions]) -> Conditions:
        return aside({word: torch.cat([part[word] for part in parts]) for word in parts[0]})

    def read(rows: Tensor) -> Conditions:
        whole = len(rows) == count
        given = tokens if whole else {word: held[rows] for word, held in tokens.items()}
        return aside(family.read_text(component, encoder, given))

    count = len(next(iter(tokens.values())))
    return in_halves(read, torch.arange(count), join=joined)


def reading_bytes(config: Mapping[str, Any], ids: Sequence[int], number_bytes: int) -> int:
    """What a text encoder takes beside its weights, somewhat more than less: scores of attention
    before and after their softmax, what an MLP is widest with, a few hidden states, and of CLIP
    those of all layers.

    Args:
        config: of CLIP or of T5.
        ids: shape of the tokens, with T last.
    """
    *many, length = ids
    width = int(config.get("hidden_size") or config["d_model"])
    inner = int(config.get("intermediate_size") or config["d_ff"])
    heads = int(config.get("num_attention_heads") or config["num_heads"])
    kept = 4 + int(config.get("num_hidden_layers") or 0)
    a_token = 2 * heads * length + kept * width + 3 * inner
    # One more: T5's biases of positions are as large as a text's scores.
    return (prod(many) + 1) * length * a_token * number_bytes


class Prompts:
    """What prompts of pictures say to a denoiser.

    Args:
        dtype: of the text encoders.
        changing: the text encoders are being trained, so that a prompt is read whenever it is
            asked for; otherwise once.
    """

    def __init__(
        self, family: Texts, lender: Lender, *, dtype: torch.dtype, changing: bool
    ) -> None:
        self._family, self._lender, self._dtype = family, lender, dtype
        self._changing = changing
        self._known: dict[str, Conditions] = {}

    def read(self, prompts: Sequence[str]) -> None:
        """Read those that are not known yet, and let go of the text encoders."""
        if self._changing:
            return
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            self._known |= zip(new, self._say(new), strict=True)
            self._lender.clear()

    def of(self, prompt: str) -> Conditions:
        """What a prompt says, on the device; read alone, as pipelines do: of a batch of two each
        sums in another order."""
        self.read([prompt])
        said = next(self._say([prompt])) if self._changing else self._known[prompt]
        return {word: held.to(self._lender.device) for word, held in said.items()}

    def _say(self, prompts: Sequence[str]) -> Iterator[Conditions]:
        alone = [[prompt] for prompt in prompts]
        return read_batches(self._family, alone, self._lender, dtype=self._dtype)
