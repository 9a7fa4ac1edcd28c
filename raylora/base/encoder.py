"""What a model family gives to the cache: pixels and captions in, named tensors out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Encoder(Protocol):
    """What a model family gives to the cache; the same numbers for the same facts."""

    @property
    def latents_facts(self) -> dict[str, Any]:
        """JSON values that name the image encoder: family, hash of the weights, dtype."""

    @property
    def text_facts(self) -> dict[str, Any]:
        """JSON values that name the text encoders, likewise."""

    def encode_images(self, pixels: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """(B, 3, H, W) in -1..1 to named tensors, each with B first."""

    def encode_texts(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        """B captions to named tensors, each with B first."""

    def encode_batches(self, batches: Sequence[Sequence[str]]) -> Iterator[dict[str, NDArray[Any]]]:
        """`encode_texts` of each batch; an encoder of several models may have one of them read many
        batches before the next."""
