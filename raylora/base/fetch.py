"""Bringing a folder from storage to this machine, once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from raylora.base.errors import WeightsError
from raylora.base.storage import open_storage


def local_folder(url: str, *, word: str = "family.weights") -> Path:
    """A local folder with the objects under `url`; a local one is taken as it is.

    Objects that are here already with the same size and tag are not fetched again.

    Args:
        word: the option that names it, for errors.

    Raises:
        WeightsError: nothing is there.
    """
    if not url.startswith("s3://"):
        folder = Path(url.removeprefix("file://")).expanduser().absolute()
        if not folder.is_dir():
            raise WeightsError(
                f"{word}: {folder} is not a folder. Give a folder in diffusers layout, "
                "local or s3://bucket/prefix."
            )
        return folder
    storage = open_storage(url)
    folder = cache_home() / "weights" / hashlib.sha256(storage.url.encode()).hexdigest()[:16]
    entries = storage.entries()
    if not entries:
        raise WeightsError(f"{word}: nothing is under {url}. Check bucket and prefix.")
    for entry in entries:
        target = folder / entry.key
        mark = target.with_name(f".{target.name}.tag")
        if target.exists() and mark.exists() and mark.read_text() == entry.tag:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        partial.write_bytes(storage.read(entry.key))
        partial.replace(target)
        mark.write_text(entry.tag)
    return folder


def cache_home() -> Path:
    """This machine's cache: $RAYLORA_HOME, or ~/.cache/raylora."""
    home = os.environ.get("RAYLORA_HOME")
    return Path(home) if home else Path.home() / ".cache" / "raylora"
