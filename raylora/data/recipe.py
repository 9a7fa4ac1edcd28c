"""Names of what is cached: a folder for each recipe, 16 bytes for each entry, hashes of causes.

Whatever changes an entry's numbers is hashed into its name, so a stale entry is never found: a new
image or geometry makes a new key, another VAE, resolution or background another folder.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from raylora.base.storage import Storage
from raylora.data.bucket import Geometry
from raylora.data.source import DataOptions

Kind = Literal["latents", "text"]
# Raised when the code between a file and the encoder starts to give other numbers.
_FORMAT = 1


def latents_recipe(latents_facts: dict[str, Any], data: DataOptions) -> dict[str, Any]:
    """All but the image itself that decides its latents."""
    image = {
        "resolution": list(data.size),
        "enable_bucket": data.enable_bucket,
        "min_bucket_reso": data.min_bucket_reso,
        "max_bucket_reso": data.max_bucket_reso,
        "bucket_reso_steps": data.bucket_reso_steps,
        "bucket_no_upscale": data.bucket_no_upscale,
        "fit": data.fit,
        "background": data.background.lower(),
    }
    return {"kind": "latents", "format": _FORMAT, "encoder": latents_facts, "image": image}


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


def latents_key(sha256: bytes, geometry: Geometry, fit: str) -> bytes:
    """16 bytes that name the latents of an image brought to a bucket this way."""
    road = [geometry.bucket, geometry.resized, geometry.crop, fit]
    return _key(b"raylora latents", sha256 + _canonical(road))


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
