"""What names a component by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylora.base.fetch import cache_home

_REMEMBERED_BYTES = 64 * 2**20
"""Files from this size on are not read twice for their hash, as long as they are unchanged."""


def content_hash(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """sha256 over a config and the bytes, shapes, dtypes and names of weights.

    The same for one model in a folder, in shards and in a single file.
    """
    # Who wrote a config, and with which version, changes no number.
    kept = {word: value for word, value in config.items() if not word.startswith("_")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    # Some programs write CLIP with this level in its names, others without.
    named = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    for name in sorted(named):
        weight = named[name].contiguous()
        digest.update(f"\n{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def remembered(files: list[Path], component: str, config: Mapping[str, Any]) -> Path | None:
    """Where the hash of a component in these files is kept; None where it is soon made anew."""
    states = [file.stat() for file in files]
    if sum(state.st_size for state in states) < _REMEMBERED_BYTES:
        return None
    facts = [
        [str(file), state.st_size, state.st_mtime_ns, state.st_ino]
        for file, state in zip(files, states, strict=True)
    ]
    named = json.dumps([component, facts, dict(config)], sort_keys=True)
    return cache_home() / "hashes" / hashlib.sha256(named.encode()).hexdigest()[:32]


def folder_hash(folder: Path) -> str:
    """sha256 over the names and the bytes of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.is_file() and not file.name.startswith("."):
            digest.update(f"\n{file.name} {file.stat().st_size}\n".encode())
            digest.update(_read(file, file.stat().st_mtime_ns))
    return digest.hexdigest()


@cache
def _read(file: Path, time: int) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()
