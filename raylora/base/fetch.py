"""Bringing folders and files from storage to this machine, once."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raylora.base.errors import WeightsError
from raylora.base.storage import Entry, Storage, open_storage

_PIECE_BYTES = 32 * 2**20
"""What is in memory of an object while it is fetched; a checkpoint may have 24 GB."""


def local_file(url: str, *, word: str = "family.weights") -> Path:
    """A local file with the bytes of one object; a local one is taken as it is.

    Raises:
        WeightsError: nothing is there.
    """
    if not is_remote(url):
        path = local_path(url)
        if not path.is_file():
            raise WeightsError(f"{word}: there is no file {path}. Check its name and folder.")
        return path
    folder, _, name = url.rpartition("/")
    storage = open_storage(folder)
    entry = storage.entry(name)
    if entry is None:
        raise WeightsError(f"{word}: there is no object {url}. Check bucket and name.")
    return fetch(storage, [entry]) / name


def is_remote(url: str) -> bool:
    """Whether it must be fetched before it can be memory-mapped."""
    return url.startswith("s3://")


def local_path(url: str) -> Path:
    """The absolute path of a plain path or a file:// URL."""
    return Path(url.removeprefix("file://")).expanduser().absolute()


def fetch(storage: Storage, entries: Iterable[Entry]) -> Path:
    """The local folder of a storage's objects, with these in it.

    Those that are here already with the same size and tag are not fetched again. Of several
    processes on one machine one fetches an object, and the others wait for it.

    Raises:
        WeightsError: an object was replaced meanwhile.
    """
    folder = cache_home() / "weights" / hashlib.sha256(storage.url.encode()).hexdigest()[:16]
    for entry in entries:
        _fetch_one(storage, entry, folder / entry.key)
    return folder


def _fetch_one(storage: Storage, entry: Entry, target: Path) -> None:
    if _is_here(entry, target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(_beside(target, "lock")):
        if _is_here(entry, target):
            return
        partial = _beside(target, "partial")
        with partial.open("wb") as file:
            for start in range(0, entry.size_bytes, _PIECE_BYTES):
                length = min(_PIECE_BYTES, entry.size_bytes - start)
                file.write(storage.read_range(entry.key, start, length))
        after = storage.entry(entry.key)
        if after is None or after.tag != entry.tag:
            raise WeightsError(
                f"{storage.url}/{entry.key} was replaced while it was fetched. Start again when "
                "nobody writes there."
            )
        _beside(target, "tag").unlink(missing_ok=True)
        partial.replace(target)
        _beside(target, "tag").write_text(entry.tag)


def _is_here(entry: Entry, target: Path) -> bool:
    try:
        held = target.stat().st_size, _beside(target, "tag").read_text()
    except FileNotFoundError:
        return False
    return held == (entry.size_bytes, entry.tag)


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{ending}")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process on this machine is in here with the same path."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def keep_text(path: Path, text: str) -> None:
    """Write a small file of the cache, so that others read all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def cache_home() -> Path:
    """This machine's cache: $RAYLORA_HOME, or ~/.cache/raylora."""
    home = os.environ.get("RAYLORA_HOME")
    return Path(home) if home else Path.home() / ".cache" / "raylora"
