"""Telling a large file by a small part of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PIECE_BYTES = 64 * 1024
_PIECES = 256


def file_fingerprint(path: Path) -> str:
    """16 hex digits from a file's size and from 256 pieces of 64 KiB, evenly over it.

    Reads 16 MiB of a file of any size. It tells one model from another; a file that was changed in
    a few places, by chance or on purpose, may pass for the one before.
    """
    size_bytes = path.stat().st_size
    digest = hashlib.blake2b(str(size_bytes).encode(), digest_size=8)
    last = max(0, size_bytes - _PIECE_BYTES)
    starts = dict.fromkeys(last * piece // (_PIECES - 1) for piece in range(_PIECES))
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
