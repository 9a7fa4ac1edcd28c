"""A tiny base for each model family; a new family's file is not tested before it has one here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raylora.families import Family, get_family

TINY = {"sd15": Path(__file__).parents[2] / "jobs" / "quickstart" / "tiny-sd"}


def tiny_folder(kind: str) -> Path:
    assert kind in TINY, f"family {kind!r} has no tiny base in tests/contract/bases.py"
    return TINY[kind]


def open_tiny(kind: str, folder: Path | None = None, **words: Any) -> Family:
    family, options = get_family(kind)
    place = folder or tiny_folder(kind)
    return family(place, options(kind=kind, weights=str(place), **words))
