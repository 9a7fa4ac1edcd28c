"""A tiny base for each model family; a new family's file is not tested before it has one here."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from programs import ROOT, load_program

from raylora.families import Family, get_family
from raylora.weights.base import open_base

JOBS = ROOT / "jobs"
TRAINED = {"sd15": JOBS / "quickstart" / "tiny-sd"}
"""Bases that were really trained; of the others there are random ones."""


MAKER = load_program("jobs/smoke/make_bases.py")
RANDOM = tuple(MAKER.KINDS)
"""Words of `random_folder`: the families, and variants of them (sd35, schnell)."""


@cache
def _bases() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="raylora-bases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def random_folder(kind: str) -> Path:
    """A tiny base with random weights, made once in a test run."""
    assert kind in RANDOM, f"family {kind!r} has no tiny base in jobs/smoke/make_bases.py"
    folder: Path = MAKER.make_base(kind, _bases() / kind)
    return folder


def tiny_folder(kind: str) -> Path:
    return TRAINED.get(kind) or random_folder(kind)


def open_tiny(kind: str, folder: Path | None = None, **words: Any) -> Family:
    """A family on its tiny base, or on a folder."""
    family, options = get_family(kind)
    place = folder or tiny_folder(kind)
    base = open_base(str(place), kind=options.layout)
    return family(base, options(kind=kind, weights=str(place), **words))
