"""What an adapter is trained without: masks that belong to (seed, step, sample, layer).

Masks are integer hashes of their place and not draws in an order, so a layer's mask is the same on
any worker, in any micro-batch, and when checkpointing computes the layer a second time. Those of
ranks and of whole layers are small and made on the CPU; those of single numbers are as large as the
activations, so the device that needs them makes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylora.base.seeds import draw_generator
from raylora.base.site import Site
from raylora.networks import Gate, NetworkOptions

_LOW = 0xFFFFFFFF
_WORDS = 6
"""32-bit words of a sample at a step: two for each of the three kinds of mask."""


class Dropout:
    """Gives each layer its gate; open for whom `begin` named, and for nobody after `end`.

    Args:
        options: the shares that are left out.
        seed: `training.seed`.
    """

    def __init__(self, options: NetworkOptions, *, seed: int) -> None:
        self._options = options
        self._seed = seed
        self._words: NDArray[np.int64] | None = None

    def begin(self, step: int, samples: Sequence[int]) -> None:
        """From here on the batch is these samples, in this order, at this step."""
        self._words = np.stack(
            [
                draw_generator(self._seed, step, number, "dropout").bit_generator.random_raw(_WORDS)
                for number in samples
            ]
        ).astype(np.uint64).view(np.int64) & np.int64(_LOW)

    def end(self) -> None:
        """Nothing is left out: for measuring and for previews."""
        self._words = None

    def gate(self, site: Site) -> Gate | None:
        """The gate of one layer for the samples at hand."""
        words = self._words
        if words is None:
            return None

        def gate(hidden: Tensor) -> Tensor:
            keep = self._kept(site, words, hidden)
            return hidden * keep.to(hidden.dtype)

        return gate

    def _kept(self, site: Site, words: NDArray[np.int64], hidden: Tensor) -> Tensor:
        """What `hidden` is multiplied with, of its shape or one that broadcasts to it."""
        options, place = self._options, _place(site.name)
        axis = 1 if site.kind == "conv" else hidden.dim() - 1
        ranks = hidden.shape[axis]
        small = np.ones((len(words), ranks))
        if options.rank_dropout:
            drawn = _hash(np.arange(ranks)[None], words[:, 0:1] ^ place, words[:, 1:2])
            small *= _weights(drawn, options.rank_dropout)
        if options.module_dropout:
            drawn = _hash(np.zeros((1, 1), np.int64), words[:, 2:3] ^ place, words[:, 3:4])
            small *= drawn >= _threshold(options.module_dropout)
        # A caption of several chunks has a row for each.
        rows = len(hidden) // len(words)
        shape = [len(hidden), *[1] * (hidden.dim() - 1)]
        shape[axis] = ranks
        keep = torch.from_numpy(np.repeat(small, rows, axis=0)).view(shape)
        keep = keep.to(hidden.device, torch.float32)
        if options.dropout:
            keep = keep * self._kept_numbers(place, words, hidden)
        return keep

    def _kept_numbers(self, place: int, words: NDArray[np.int64], hidden: Tensor) -> Tensor:
        count = hidden.numel() // len(words)
        keys = torch.from_numpy(words[:, 4:6].copy()).to(hidden.device)
        places = torch.arange(count, device=hidden.device)[None]
        drawn = _hash_tensor(places, keys[:, 0:1] ^ place, keys[:, 1:2])
        kept = drawn >= _threshold(self._options.dropout)
        return kept.view(hidden.shape).to(torch.float32) / (1.0 - self._options.dropout)


def _threshold(share: float) -> int:
    return round(share * 2**32)


def _weights(drawn: NDArray[np.int64], share: float) -> NDArray[np.float64]:
    return (drawn >= _threshold(share)) / (1.0 - share)


def _place(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")


def _hash(
    places: NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.int64]:
    """32 bits of each place under two key words, in int64; as `_hash_tensor`."""
    tensors = (torch.from_numpy(np.ascontiguousarray(one)) for one in (places, first, second))
    found: NDArray[np.int64] = _hash_tensor(*tensors).numpy()
    return found


def _hash_tensor(places: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """32 bits of each place under two key words, in int64.

    Source: two rounds of C. Wellons' "lowbias32", a 32-bit mixer of little bias. int64 products
    wrap around, which leaves their lower 32 bits right.
    """
    return _mix(_mix((places + first) & _LOW) ^ second)


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW
    return x ^ (x >> 16)
