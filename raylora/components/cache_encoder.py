"""What fills the cache: a VAE and the text encoders of a family, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylora.components.vae import VaeFacts, encode_pixels


class CacheEncoder:
    """VAE mode and what the text encoders say; an `Encoder` of the cache.

    Args:
        vae: as `load_vae` gives it, with its facts.
        read: the conditions of captions, as the denoiser is given them.
        latents_facts, text_facts: what names both.
    """

    def __init__(
        self,
        vae: nn.Module,
        vae_facts: VaeFacts,
        read: Callable[[Sequence[str]], dict[str, Tensor]],
        facts: tuple[dict[str, Any], dict[str, Any]],
    ) -> None:
        self._vae = vae
        self._vae_facts = vae_facts
        self._read = read
        self.latents_facts, self.text_facts = facts

    def encode_images(self, pixels: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """`latents` (B, C, h, w) float32."""
        return {"latents": encode_pixels(self._vae, pixels, self._vae_facts)}

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        """What `read` gives, as arrays."""
        return {word: held.cpu().numpy() for word, held in self._read(captions).items()}
