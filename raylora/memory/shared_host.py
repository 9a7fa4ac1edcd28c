"""One copy of host memory for all processes of a machine.

A folder in memory holds a file for each key, whole or not at all. Locks of the kernel's say who
uses it and who fills a file: those of a process that was killed are gone with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

_USERS = "users"
"""Locked by every process that uses the folder; together with the others, or alone to remove it."""


class SharedFolder:
    """A place in memory that processes of one user fill and read together.

    Args:
        root: a file system in memory, such as /dev/shm.
        name: whoever gives the same one shares it.

    Raises:
        OSError: there is no such place.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / f"{_prefix()}{_digest(name)}"
        self._users = _join(self.path)
        self._leave = weakref.finalize(self, _leave, self.path, self._users, os.getpid())

    def tensor(self, key: str, bytes_: int, fill: Callable[[Tensor], None]) -> Tensor:
        """The bytes of a key, (bytes,) uint8, mapped by all; filled by whoever is first.

        Raises:
            OSError: there is too little room for them.
        """
        name = _digest(f"{key} {bytes_}")
        whole, part = self.path / name, self.path / f"{name}.part"
        with _locked(self.path / f"{name}.lock"):
            if not whole.exists():
                try:
                    _reserve(part, bytes_)
                    fill(_mapped(part, bytes_))
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
                part.rename(whole)
        return _mapped(whole, bytes_)

    def leave(self) -> None:
        """Use it no more; the last one removes it. What is mapped stays until it is dropped."""
        self._leave()


def remove_abandoned(root: Path) -> None:
    """Remove folders of this user whose processes were all killed, so that memory is free again."""
    for folder in root.glob(f"{_prefix()}*"):
        _remove_if_left(folder)


def _prefix() -> str:
    return f"raylora-{os.getuid()}-"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _mapped(path: Path, bytes_: int) -> Tensor:
    return torch.from_file(str(path), shared=True, size=bytes_, dtype=torch.uint8)


def _reserve(path: Path, bytes_: int) -> None:
    # A file with holes would end the process where memory has no room for them later.
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, bytes_)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _join(folder: Path) -> int:
    """The open file whose lock says that the folder is used."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            users = os.open(folder / _USERS, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # its last user has just removed it
            continue
        fcntl.flock(users, fcntl.LOCK_SH)
        if _is_there(folder, users):
            return users
        os.close(users)


def _is_there(folder: Path, users: int) -> bool:
    """Whether the open file is the folder's still: it may have been removed before it was ours."""
    try:
        return os.path.samestat(os.fstat(users), (folder / _USERS).stat())
    except FileNotFoundError:
        return False


def _leave(folder: Path, users: int, process: int) -> None:
    if os.getpid() != process:  # a fork of it: the lock is its parent's
        return
    _remove_if_alone(folder, users)
    os.close(users)


def _remove_if_left(folder: Path) -> None:
    """Remove a folder whose users were all killed."""
    try:
        users = os.open(folder / _USERS, os.O_RDWR)
    except OSError:  # not made yet, or not a folder
        return
    _remove_if_alone(folder, users)
    os.close(users)


def _remove_if_alone(folder: Path, users: int) -> None:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    if not _is_there(folder, users):
        return
    for path in folder.iterdir():
        if path.name != _USERS:
            path.unlink(missing_ok=True)
    # Last, since whoever joins meanwhile waits for its lock.
    (folder / _USERS).unlink()
    with suppress(OSError):  # somebody has already begun anew in it
        folder.rmdir()
