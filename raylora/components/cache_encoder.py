"""What fills the cache: a VAE and the text encoders of a family, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raylora.components.lent import Lender, Load
from raylora.components.texts import Texts, read_batches
from raylora.components.vae import VaeFacts, encode_pixels


class CacheEncoder:
    """VAE mode and what the text encoders say; an `Encoder` of the cache.

    Each model is lent while it is needed, the VAE for pictures and the text encoders for captions.

    Args:
        family: who reads captions.
        load_vae: gives the VAE in float32.
        facts: what names the latents, and what names the texts.
    """

    def __init__(
        self,
        family: Texts,
        load_vae: Load,
        vae_facts: VaeFacts,
        facts: tuple[dict[str, Any], dict[str, Any]],
        lender: Lender,
    ) -> None:
        self._family, self._load_vae, self._lender = family, load_vae, lender
        self._vae_facts = vae_facts
        self.latents_facts, self.text_facts = facts

    def encode_images(self, pixels: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """`latents` (B, C, h, w) float32."""
        with self._lender.lend("vae", self._load_vae) as vae:
            return {"latents": encode_pixels(vae, pixels, self._vae_facts)}

    def encode_texts(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        """What the denoiser is told of them, as arrays."""
        (found,) = self.encode_batches([captions])
        return found

    def encode_batches(self, batches: Sequence[Sequence[str]]) -> Iterator[dict[str, NDArray[Any]]]:
        """`encode_texts` of each."""
        for said in read_batches(self._family, batches, self._lender, dtype=torch.float32):
            yield {word: held.numpy() for word, held in said.items()}
