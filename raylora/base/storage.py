"""Where runs, caches and data live: a folder or an S3 bucket, behind one small interface.

Every object is written whole or not at all, so a reader never sees half of one, whatever was killed
when. A `Storage` is safe to use from many threads, and pickles as its URL alone: each process takes
its credentials from its own AWS_* environment variables.
"""

from __future__ import annotations

import os
import unicodedata
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from raylora.base.errors import StorageError


@dataclass(frozen=True)
class Entry:
    """One object as a listing shows it."""

    key: str
    size_bytes: int
    tag: str
    """Changes when the object does: the ETag on s3, the modification time in ns on a disk."""


class Storage(ABC):
    """Objects under one URL, named by '/'-separated keys relative to it.

    No part of a key may be empty or start with '.': such names are hidden, never written and never
    listed (an unfinished write has one, and so have a desktop's own files beside images).
    """

    url: str
    """'file:///abs/path' or 's3://bucket/prefix', without a slash at the end."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object.

        Raises:
            MissingObject: there is none of that name.
        """

    @abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `start`, to fetch a row group without its neighbours.

        Raises:
            MissingObject: there is none of that name.
            StorageError: the object ends before the range does.
        """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put the object there whole or not at all, in place of any earlier one."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Put the object there whole, unless the name is taken; of many callers one gets True.

        False means that someone else's object has the name. An s3 answer that was lost on the way
        counts as ours when the object holds our very bytes: callers who race with equal bytes (the
        same content under its hash) may then both get True, so a claim must carry its owner.
        """

    @abstractmethod
    def entries(self, prefix: str = "") -> list[Entry]:
        """All objects below the folder `prefix`, at any depth, sorted by key; [] when none.

        Keys are relative to this storage, as `read` takes them. "runs/1" does not list "runs/10/x".
        """

    def scan(self, prefix: str = "") -> Iterator[Entry]:
        """As `entries`, but one after the other, so that a million objects need no memory.

        In order of key wherever the store lists so, as disks and Amazon do; others list all of
        `cat/` before `cat-2/`. Who relies on the order looks at it.
        """
        yield from self.entries(prefix)

    @abstractmethod
    def entry(self, key: str) -> Entry | None:
        """Size and tag of one object without reading it; None when it is not there."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; no error when it is not there."""

    @abstractmethod
    def within(self, prefix: str) -> Storage:
        """The same place with `prefix` as its root."""

    def check(self) -> None:
        """Prove, before hours are spent, that this place can hold a run.

        Writes, reads back, lists, asks that a second exclusive create is refused, deletes.

        Raises:
            StorageError: says which of these failed, and what to try.
        """
        self._check_in(f"raylora-check-{uuid.uuid4().hex}")

    def _check_in(self, folder: str) -> None:
        key = f"{folder}/object"
        data = f"{key} of `raylora check`; may be deleted".encode()
        self.write(key, data)
        try:
            self._expect(self.read(key) == data, "what was written does not read back the same")
            self._expect(self.entry(key) is not None, "what was written cannot be found again")
            listed = [entry.key for entry in self.entries(folder)]
            self._expect(listed == [key], "what was written is missing from the listing")
            taken = not self.create(key, b"not " + data)
            self._expect(taken, "an exclusive create (If-None-Match: *) overwrote an object")
            self.delete(key)
            self._expect(self.entry(key) is None, "a deleted object is still there")
            self._expect(self.create(key, data), "a free name was refused as taken")
        finally:
            # What went wrong above is the better message.
            with suppress(StorageError):
                self.delete(key)

    def _expect(self, held: bool, problem: str) -> None:
        if not held:
            raise StorageError(
                f"{self.url}: {problem}. Two workers could spoil each other's files here; choose "
                "a store with immediate consistency and conditional writes."
            )

    def __reduce__(self) -> tuple[Callable[[str], Storage], tuple[str]]:
        return open_storage, (self.url,)

    def __repr__(self) -> str:
        return f"open_storage({self.url!r})"


def open_storage(url: str) -> Storage:
    """The storage at 's3://bucket/prefix', 'file:///path' or a plain path; touches nothing yet.

    Paths are taken as they are written, %20 and all.

    Raises:
        StorageError: the URL is of another kind, or carries credentials.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "file", os.path.abspath(os.path.expanduser(url)) if url else ""
    if scheme == "s3":
        # Imported here: botocore costs a quarter of a second of CPU, for nothing on a disk.
        from raylora.base.storage_s3 import S3Storage

        return S3Storage(rest)
    if scheme == "file" and rest.startswith("/"):
        from raylora.base.storage_file import FileStorage

        return FileStorage(rest)
    shown = f"{scheme}://..." if "@" in url else repr(url)
    raise StorageError(
        f"{shown} is no place raylora can open. Write 's3://bucket/prefix', 'file:///abs/path' or "
        "a path (other S3-compatible stores: s3:// with AWS_ENDPOINT_URL set)."
    )


def checked_key(key: str) -> str:
    """The key itself, when it can name an object in every kind of storage.

    Raises:
        StorageError: it is empty, absolute, hidden, climbs out ('..') or is not clean text.
    """
    parts = key.split("/")
    if any(not part or part.startswith(".") for part in parts):
        problem = "no part between slashes may be empty or start with '.'"
    elif any(unicodedata.category(letter) in {"Cc", "Cs"} for letter in key):
        problem = "it has a control character, or bytes that are not UTF-8"
    else:
        return key
    raise StorageError(f"{key!r} cannot be the name of an object: {problem}. Rename it.")


def is_key(key: str) -> bool:
    """Whether `checked_key` lets the name pass; listings leave out what nobody could read."""
    try:
        checked_key(key)
    except StorageError:
        return False
    return True


def range_error(place: str, start: int, length: int, size_bytes: int) -> StorageError:
    """The error of `read_range` when the object ends before the range does."""
    return StorageError(
        f"{place}: bytes {start} to {start + length} were asked for, and it has {size_bytes}. "
        "It was replaced or cut short; make it anew."
    )
