"""One training row: an image, its bucket, and the names of its cached tensors."""

from __future__ import annotations

from dataclasses import dataclass

from raylora.data.bucket import Size


@dataclass(frozen=True, slots=True)
class Row:
    """What training knows of one image; its tensors are fetched by their keys."""

    key: str
    """The image's path relative to the data folder; names its randomness."""
    repeats: int
    """Showings in an epoch."""
    bucket: Size
    """Width and height in pixels."""
    latents_key: bytes
    text_key: bytes
    caption: str
    original_size: Size
    crop: Size
    """Left and top of the true crop, in the resized image."""


@dataclass(frozen=True, slots=True)
class BadSample:
    """An image that is left out, and why."""

    key: str
    reason: str
