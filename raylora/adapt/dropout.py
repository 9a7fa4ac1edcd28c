"""What an adapter is trained without, and which part of it: by (seed, step, sample, layer).

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
from torch import Tensor

from raylora.base.seeds import draw_generator
from raylora.base.site import Site
from raylora.networks import Gate, NetworkOptions, Part

_LOW = 0xFFFFFFFF
_WORDS = 8
"""32-bit words of a sample at a step: two for each of the three kinds of mask, and for parts."""


class Dropout:
    """Gives each layer its gate; open for whom `begin` named, and for nobody after `end`.

    Args:
        options: the shares that are left out.
        seed: `training.seed`.
        unit: how many ranks of a layer each sample trains at a time (`Network.unit`); 0 is all.
    """

    def __init__(self, options: NetworkOptions, *, seed: int, unit: int = 0) -> None:
        self._options = options
        self._seed = seed
        self._unit = unit
        self._drops = bool(options.dropout or options.rank_dropout or options.module_dropout)
        self._words: Tensor | None = None
        self._layers: dict[str, int] = {}
        self._ranks = 0
        self._small: Tensor | None = None
        self._keys: Tensor | None = None
        self._parts: Tensor | None = None

    def begin(self, step: int, samples: Sequence[int]) -> None:
        """From here on the batch is these samples, in this order, at this step."""
        words = np.stack(
            [
                draw_generator(self._seed, step, number, "dropout").bit_generator.random_raw(_WORDS)
                for number in samples
            ]
        )
        self._words = torch.from_numpy(words.astype(np.uint64).view(np.int64) & np.int64(_LOW))
        self._small = self._keys = self._parts = None

    def end(self) -> None:
        """Nothing is left out: for measuring and for previews."""
        self._words = None

    def gate(self, site: Site) -> Gate | None:
        """The gate of one layer for the samples at hand."""
        words = self._words
        if words is None or not self._drops:
            return None

        def gate(hidden: Tensor) -> Tensor:
            keep = self._kept(site, words, hidden)
            return hidden * keep.to(hidden.dtype)

        return gate

    def part(self, site: Site) -> Part | None:
        """Which ranks of one layer each of the samples at hand trains."""
        words, unit = self._words, self._unit
        if words is None or not unit:
            return None

        def part(ranks: int, rows: Tensor) -> tuple[Tensor, int]:
            layer = self._layer(site)
            if self._parts is None or layer >= len(self._parts):
                zero = torch.zeros(1, dtype=torch.int64)
                drawn_LB1 = _hash(zero, words[:, 6:7] ^ self._places(), words[:, 7:8])
                self._parts = drawn_LB1[..., 0].to(rows.device, non_blocking=True)
            drawn_B = self._parts[layer].repeat_interleave(len(rows) // len(words))
            # The 32 bits drawn are a fraction of 2**32.
            return unit * ((drawn_B * (ranks // unit)) >> 32), unit

        return part

    def _layer(self, site: Site) -> int:
        """A number of the layer, in the order in which they first asked."""
        return self._layers.setdefault(site.name, len(self._layers))

    def _places(self) -> Tensor:
        """(L, 1, 1) of every layer so far, by its name alone."""
        return torch.tensor([_place(name) for name in self._layers])[:, None, None]

    def _kept(self, site: Site, words_BW: Tensor, hidden: Tensor) -> Tensor:
        """What `hidden` is multiplied with, of its shape or one that broadcasts to it."""
        axis = 1 if site.kind == "conv" else hidden.dim() - 1
        # Where all ranks share their fate, what is gated may be as wide as the layer.
        ranks = hidden.shape[axis] if self._options.rank_dropout else 1
        small_LBR, keys_LBK = self._of_all_layers(site, words_BW, ranks, hidden.device)
        layer = self._layers[site.name]
        shape = [len(hidden), *[1] * (hidden.dim() - 1)]
        shape[axis] = ranks
        # A caption of several chunks has a row for each.
        rows = len(hidden) // len(words_BW)
        keep = small_LBR[layer, :, None, :ranks].expand(-1, rows, -1).reshape(shape)
        if self._options.dropout:
            keep = keep * self._kept_numbers(keys_LBK[layer], hidden)
        return keep

    def _of_all_layers(
        self, site: Site, words_BW: Tensor, ranks: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Masks of ranks and layers, and the keys of those of numbers, of every layer so far.

        Made at once when the first layer of a batch asks, so that a GPU is sent them once and not
        waited for at each layer. In the first batch there are more layers each time.
        """
        layer, wider = self._layer(site), ranks > self._ranks
        self._ranks = max(self._ranks, ranks)
        if self._small is None or self._keys is None or layer >= len(self._small) or wider:
            places_L11 = self._places()
            small, keys = self._masks(places_L11, words_BW), places_L11 ^ words_BW[:, 4:6]
            keys[..., 1] = words_BW[:, 5]
            self._small = small.to(device, non_blocking=True)
            self._keys = keys.to(device, non_blocking=True)
        return self._small, self._keys

    def _masks(self, places_L11: Tensor, words_BW: Tensor) -> Tensor:
        """(L, B, R) float32, what a rank is multiplied with."""
        options, words_WB1 = self._options, words_BW.T[..., None]
        layers, samples = len(places_L11), len(words_BW)
        small_LBR = torch.ones(layers, samples, self._ranks, dtype=torch.float64)
        if options.rank_dropout:
            drawn = _hash(torch.arange(self._ranks), words_WB1[0] ^ places_L11, words_WB1[1])
            kept = drawn >= _threshold(options.rank_dropout)
            small_LBR *= kept / (1.0 - options.rank_dropout)
        if options.module_dropout:
            drawn = _hash(
                torch.zeros(1, dtype=torch.int64), words_WB1[2] ^ places_L11, words_WB1[3]
            )
            small_LBR *= drawn >= _threshold(options.module_dropout)
        return small_LBR.float()

    def _kept_numbers(self, keys_BK: Tensor, hidden: Tensor) -> Tensor:
        count = hidden.numel() // len(keys_BK)
        places = torch.arange(count, device=hidden.device)[None]
        drawn = _hash(places, keys_BK[:, 0:1], keys_BK[:, 1:2])
        kept = drawn >= _threshold(self._options.dropout)
        return kept.view(hidden.shape).to(torch.float32) / (1.0 - self._options.dropout)


def _threshold(share: float) -> int:
    return round(share * 2**32)


def _place(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")


def _hash(places: Tensor, first: Tensor, second: Tensor) -> Tensor:
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
