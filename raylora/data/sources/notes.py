"""Words for what a person should know about a set: counts, and the first few names."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(names: Sequence[str]) -> str:
    """The first three names, and a sign that there are more."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def images_in_words(count: int) -> str:
    """'1 image' or '7 images'."""
    return "1 image" if count == 1 else f"{count} images"
