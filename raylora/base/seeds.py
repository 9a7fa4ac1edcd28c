"""Randomness that belongs to (seed, step, sample, purpose) and to nothing else.

numpy's Philox is counter-based: a draw is a pure function of its key and counter, the same bits on
every machine, whichever worker asks and in whatever order. Torch's generators are not used
anywhere, since their bits differ between CPU kinds.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Purpose = Literal[
    "initial weights",
    "noise",
    "timestep",
    "order",
    "validation",
    "ruler",
    "preview",
    "variant",
    "picture",
    "caption",
    "caption dropout",
    "encoder dropout",
    "picture turn",
    "caption turn",
    "dropout",
    "noise offset",
    "noise offset strength",
    "noise pyramid",
    "input noise",
    "input noise strength",
    "test",
]


def draw_generator(seed: int, step: int, sample: int, purpose: Purpose) -> np.random.Generator:
    """A generator for one purpose of one sample at one global step.

    Args:
        seed: the job's `training.seed` (or `data.order_seed` for "order").
        step: global step; 0 where a draw does not depend on it.
        sample: the sample's 64-bit number (`sample_number`), or an index where no image is meant.
        purpose: what is drawn, so that no two uses share bits.

    Source: Salmon et al. 2011 (Philox); key and counter layout are ours and golden-tested.
    """
    purpose_bits = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "big")
    key = np.array([seed % 2**64, purpose_bits], dtype=np.uint64)
    # The generator itself counts in word 0, so two streams meet only after 2**64 blocks.
    counter = np.array([0, step % 2**64, sample % 2**64, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def draw_normal(
    shape: tuple[int, ...], *, seed: int, step: int, sample: int, purpose: Purpose
) -> NDArray[np.float32]:
    """Standard normal float32 numbers of one sample."""
    return draw_generator(seed, step, sample, purpose).standard_normal(shape, dtype=np.float32)


def sample_number(key: str, repeat: int, of_set: int = 0) -> int:
    """The 64-bit number under which the `repeat`-th showing of an image draws its randomness.

    Args:
        key: the image's path relative to its data folder, so that moving the folder to another
            storage changes nothing.
        repeat: 0 for the first showing in an epoch, and so on.
        of_set: which of the job's sets the image is of: two sets may show the same image.
    """
    name = f"{key}\0{repeat}" + (f"\0{of_set}" if of_set else "")
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def uniforms(generator: np.random.Generator, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), of raw bits alone: numpy promises these for ever."""
    bits = generator.bit_generator.random_raw(count)
    return np.ldexp((np.asarray(bits, np.uint64) >> np.uint64(11)).astype(np.float64), -53)


def whole_number(generator: np.random.Generator, below: int) -> int:
    """One of 0 … below - 1, each as likely."""
    return int(uniforms(generator, 1)[0] * below)


def shuffled_order(generator: np.random.Generator, count: int) -> list[int]:
    """0 … count - 1 in a random order."""
    bits = np.asarray(generator.bit_generator.random_raw(count), np.uint64)
    order: list[int] = np.argsort(bits, kind="stable").tolist()
    return order
