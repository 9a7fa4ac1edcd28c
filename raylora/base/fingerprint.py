"""Telling a large file by a small part of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PIECE_BYTES = 64 * 1024
_PIECES = 256


def file_fingerprint(path: Path) -> str:
    """16 hex digits from a file's size and from 256 pieces of 64 KiB, evenly over it.

    A base of 24 GB takes a tenth of a second. Two trainings of one model differ in every piece; a
    file that was changed on purpose to pass for another is not what this is for.
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
