"""Damage the zoo's files and read them: whatever is not pixels or a DataError is a find.

    python tests/fuzz/decode.py --minutes 10

A child reads; when it dies or hangs, the parent notes the input and starts another behind it. An
input is made from (seed, number) alone: `--only NUMBER` reads one again.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import resource
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/data"))

import numpy as np
from imagezoo import OTHER, zoo

from raylora.base.errors import DataError
from raylora.data.pixels.augment import Look, apply_look
from raylora.data.pixels.bucket import Buckets
from raylora.data.pixels.decode import decode_image, decode_mask, decode_with_alpha, read_size
from raylora.data.pixels.masks import fit_mask

HANG_SECONDS = 20
# 89 million pixels in RGBA, a background, and the RGB of both.
MOST_BYTES = 3 * 2**30
_NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1)


def seeds() -> list[bytes]:
    """The zoo's images, the large ones left out: their megabytes are all alike."""
    images = [one.data for name, one in zoo().items() if name not in OTHER]
    return [data for data in images if len(data) < 200_000]


def damaged(files: Sequence[bytes], seed: int, number: int) -> bytes:
    """One of the files with 1 to 5 damages, the same for the same seed and number."""
    draw = random.Random(f"{seed} {number}")
    data = bytearray(draw.choice(files))
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        draw.choice(_DAMAGES)(data, draw, files)
    if data.startswith(b"\x89PNG") and draw.random() < 0.8:
        _mend_sums(data)  # else the damage goes no deeper than the checksum
    return bytes(data)


def read_all(data: bytes) -> str:
    """Read a file in every way.

    Returns:
        "shown" or "refused".
    """
    outcomes = set()
    for read in (read_size, decode_image, decode_with_alpha, decode_mask, _fit):
        try:
            read(data, "file")
            outcomes.add("shown")
        except DataError as error:
            outcomes.add("refused")
            reason = str(error).removeprefix("file: ")
            if reason == str(error) or not reason or "MemoryError" in reason:
                raise AssertionError(f"a reason that says nothing: {error}") from error
    return "shown" if outcomes == {"shown"} else "refused"


def _fit(data: bytes, key: str) -> None:
    size = read_size(data, key)
    try:
        geometry = Buckets((64, 64), minimum=8, step=8).place(size)
    except DataError as error:  # which names no file
        raise DataError(f"{key}: {error}") from error
    pixels, alpha = decode_with_alpha(data, key, target=geometry.resized)
    assert pixels.dtype == np.uint8
    assert all(
        got == whole or got >= 2 * least
        for got, whole, least in zip(pixels.shape[1::-1], size, geometry.resized, strict=True)
    )
    look = Look(geometry, flip=True, hue=3.0)
    assert apply_look(pixels, look, (0, 0, 0)).shape == (*geometry.bucket[::-1], 3)
    if alpha is not None:
        assert fit_mask(alpha, look, picture=size).shape == geometry.bucket[::-1]


def _flip_bits(data: bytearray, draw: random.Random, files: Sequence[bytes]) -> None:
    for _ in range(draw.choice((1, 1, 4, 30))):
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _early_byte(data: bytearray, draw: random.Random, files: Sequence[bytes]) -> None:
    if data:
        data[draw.randrange(min(len(data), 200))] = draw.randrange(256)


def _number(data: bytearray, draw: random.Random, files: Sequence[bytes]) -> None:
    form = draw.choice(("<H", ">H", "<I", ">I"))
    size = struct.calcsize(form)
    if len(data) > size:
        end = draw.choice((len(data), min(len(data), 200)))
        value = draw.choice(_NUMBERS) % 256**size
        struct.pack_into(form, data, draw.randrange(max(1, end - size)), value)


def _cut(data: bytearray, draw: random.Random, files: Sequence[bytes]) -> None:
    del data[draw.randrange(len(data) + 1) :]


def _remove(data: bytearray, draw: random.Random, files: Sequence[bytes]) -> None:
    start = draw.randrange(len(data) + 1)
    del data[start : start + draw.choice((1, 2, 4, 100))]


def _repeat(data: bytearray, draw: random.Random, files: Sequence[bytes]) -> None:
    start = draw.randrange(len(data) + 1)
    part = data[start : start + draw.choice((1, 4, 12, 100))]
    data[start:start] = part * draw.choice((1, 2, 50))


def _clear(data: bytearray, draw: random.Random, files: Sequence[bytes]) -> None:
    start = draw.randrange(len(data) + 1)
    stop = min(len(data), start + draw.choice((4, 16, 300)))
    data[start:stop] = bytes([draw.choice((0, 255))]) * (stop - start)


def _splice(data: bytearray, draw: random.Random, files: Sequence[bytes]) -> None:
    other = draw.choice(files)
    start = draw.randrange(len(other) + 1)
    part = other[start : start + draw.choice((8, 40, 1000))]
    place = draw.randrange(len(data) + 1)
    data[place : place + draw.choice((0, len(part)))] = part


_DAMAGES: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    *(_flip_bits, _flip_bits, _early_byte, _early_byte, _number, _number),
    *(_cut, _remove, _repeat, _clear, _splice),
)


def _mend_sums(data: bytearray) -> None:
    """Right the checksums of a PNG's chunks, as far as its lengths lead."""
    place = 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            return
        struct.pack_into(">I", data, end, zlib.crc32(data[place + 4 : end]))
        place = end + 4


def _work(seed: int, first: int, counts: Any) -> None:
    """Read inputs until ended; `counts`: the number in hand, shown, refused, peak MiB."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    files, number = seeds(), first
    logging.disable()  # Pillow logs what it also raises
    # Some of the C libraries write what they think to standard error; tracebacks go to output.
    sys.stderr = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while True:
        counts[0] = number
        outcome = read_all(damaged(files, seed, number))
        counts[1 if outcome == "shown" else 2] += 1
        counts[3] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        number += 1


def _hunt(seed: int, minutes: float) -> int:
    """Run children until the time is over; the number of finds."""
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", [0, 0, 0, 0])
    began, said, finds = time.monotonic(), 0.0, 0
    child, seen, since = None, -1, began
    while time.monotonic() < began + 60 * minutes:
        if child is None:
            child = context.Process(target=_work, args=(seed, counts[0], counts), daemon=True)
            child.start()
            since = time.monotonic() + 30  # for its imports and the zoo
        child.join(0.5)
        now = time.monotonic()
        if counts[0] != seen:
            seen, since = counts[0], max(now, since) if seen < 0 else now
        hangs = now - since > HANG_SECONDS
        if hangs or child.exitcode is not None:
            how = "hangs" if hangs else f"ends the child with {child.exitcode}"
            print(f"FIND  input {counts[0]} of seed {seed} {how}", flush=True)
            child.kill()
            child.join()
            child, finds, seen = None, finds + 1, -1
            counts[0] += 1
        if now - began - said >= 60 or now - began >= 60 * minutes:
            said = now - began
            _number_in_hand, shown, refused, peak_mib = counts[:]
            done = shown + refused
            print(
                f"{said:4.0f} s  {done} inputs  {done / said * 60:.0f} a minute  {shown} shown  "
                f"{refused} refused  peak {peak_mib} MiB  {finds} finds",
                flush=True,
            )
    if child is not None:
        child.kill()
    return finds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="read this one input, here")
    chosen = parser.parse_args()
    if chosen.only is None:
        sys.exit(1 if _hunt(chosen.seed, chosen.minutes) else 0)
    data = damaged(seeds(), chosen.seed, chosen.only)
    print(f"{len(data)} bytes, begins with {data[:32]!r}")
    print(read_all(data))


if __name__ == "__main__":
    main()
