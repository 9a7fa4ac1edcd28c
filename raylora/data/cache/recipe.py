"""Names of what is cached: a folder for each recipe, 16 bytes for each entry, hashes of causes.

Whatever changes an entry's numbers is hashed into its name, so a stale entry is never found:
another image, cut or background makes another key; another VAE, text encoder or clip skip another
folder.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Literal

from raylora.base.storage import Storage

if TYPE_CHECKING:
    from raylora.data.options import SetOptions
    from raylora.data.pixels.augment import Look

Kind = Literal["latents", "text"]
# Raised when the code between a file and the encoder starts to give other numbers: 2 decodes large
# JPEGs at reduced scale.
_FORMAT = 2
_ROADS = 2**16
ALPHA = b"alpha"
"""In a mask's place: the picture's own alpha channel."""


def latents_recipe(latents_facts: dict[str, Any]) -> dict[str, Any]:
    """All but the picture itself that decides its latents."""
    return {"kind": "latents", "format": _FORMAT, "encoder": latents_facts}


def text_recipe(text_facts: dict[str, Any]) -> dict[str, Any]:
    """All but the caption itself that decides its embedding."""
    return {"kind": "text", "format": _FORMAT, "encoder": text_facts}


def recipe_folder(recipe: dict[str, Any]) -> str:
    """`latents-<hash>` or `text-<hash>`: the cache folder of a recipe."""
    return f"{recipe['kind']}-{hash16(_canonical(recipe))}"


def write_recipe(cache: Storage, recipe: dict[str, Any]) -> str:
    """Leave the recipe, readable, in its folder; the folder's name."""
    folder = recipe_folder(recipe)
    key = f"{folder}/recipe.json"
    if cache.entry(key) is None:
        cache.create(key, json.dumps(recipe, indent=2, ensure_ascii=False).encode())
    return folder


class LatentsNamer:
    """Names the latents of a set's pictures; remembers what pictures of one shape share."""

    def __init__(self, options: SetOptions) -> None:
        self._same = [options.fit, options.background.lower(), options.resize_interpolation]
        self._roads: dict[Look, bytes] = {}

    def key(self, sha256: bytes, look: Look, mask: bytes = b"") -> bytes:
        """16 bytes that name the latents of an image brought to its bucket this way.

        Args:
            sha256: of the image file.
            mask: SHA-256 of the mask file, or ALPHA; empty without a mask.
        """
        road = self._roads.get(look)
        if road is None:
            place = look.geometry
            cut = [place.bucket, place.resized, place.crop, place.paste]
            road = _canonical([cut, look.flip, look.hue, look.gamma, self._same])
            if len(self._roads) >= _ROADS:  # random cuts seldom come again
                self._roads.clear()
            self._roads[look] = road
        return _key(b"raylora latents", sha256 + mask + road)


def text_key(caption: str) -> bytes:
    """16 bytes that name the embedding of a caption."""
    return _key(b"raylora text", caption.encode())


def hash16(data: bytes) -> str:
    """16 hex digits of a hash, for names of folders."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _key(person: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, person=person).digest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
