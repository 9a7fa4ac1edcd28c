"""Words and globs that stand for layers, as jobs write them, and help where one stands for none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import get_args

from raylora.base.lookup import did_you_mean
from raylora.base.site import Role, Site

ROLES: tuple[str, ...] = get_args(Role)
"""What layers do; each stands for the layers that do it."""
_WILD = "*?["


def matches(pattern: str, site: Site) -> bool:
    """Whether a layer is meant.

    Args:
        pattern: what layers do ("mlp"), a stretch of the model ("single", "mid"), or a glob over
            the whole name ("*.attn1.*"), in which `*` also stands for dots. Names have dots, so
            none is a word.
    """
    if pattern in ROLES:
        return site.role == pattern
    return pattern == site.section or fnmatchcase(site.name, pattern)


def first_match(patterns: Iterable[str], site: Site) -> str | None:
    """The first of them that means a layer."""
    return next((pattern for pattern in patterns if matches(pattern, site)), None)


def nearest(pattern: str, sites: Sequence[Site]) -> str:
    """A sentence to put behind "matches no layer": what may have been meant."""
    words = {*ROLES, *(site.section for site in sites if site.section)}
    if "." not in pattern and not any(sign in pattern for sign in _WILD):
        return did_you_mean(pattern, words - {pattern})
    pieces = {piece for site in sites for piece in site.name.split(".") if not piece.isdecimal()}
    for piece in pattern.split("."):
        plain = piece.strip("*")
        unknown = plain and not plain.isdecimal() and not any(sign in plain for sign in _WILD)
        if unknown and not any(plain in one for one in pieces):
            near = difflib.get_close_matches(plain, sorted(pieces), n=1, cutoff=0.5)
            if near:
                return f" Did you mean {near[0]!r} where it says {plain!r}?"
    names = [site.name for site in sites]
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
    return f" Layers are named like {near[0]}." if near else ""
