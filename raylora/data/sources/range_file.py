"""A stored object as a file that can be sought in, for readers that want one (tarfile, Parquet)."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from raylora.base.storage import Entry, Storage

if TYPE_CHECKING:
    from typing_extensions import Buffer

_FIRST_BYTES = 2**12
_MOST_BYTES = 2**22
# Over a network a request costs as much time as some megabytes do; on a disk hardly anything.
_NETWORK_GAP_BYTES = 2**20
_DISK_GAP_BYTES = 2**14


class RangeFile(io.RawIOBase):
    """Reads an object in ranges, further ahead the more it is read from front to back.

    A jump over more than a request is worth is never read: the headers of a tar of large images
    are fetched without the images. Not safe to share between threads.
    """

    def __init__(self, storage: Storage, entry: Entry) -> None:
        super().__init__()
        self._storage, self._entry = storage, entry
        network = not storage.url.startswith("file://")
        self._gap_bytes = _NETWORK_GAP_BYTES if network else _DISK_GAP_BYTES
        self._ahead_bytes = _FIRST_BYTES // 2
        self._position = 0
        self._start, self._block = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._entry.size_bytes}
        self._position = base[whence] + offset
        if self._position < 0:
            raise ValueError(f"cannot seek to {self._position}")
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        """Fill the buffer, to the last byte unless the object ends."""
        target = memoryview(buffer).cast("B")
        wanted = max(0, min(len(target), self._entry.size_bytes - self._position))
        done = 0
        while done < wanted:
            at = self._position - self._start
            if not 0 <= at < len(self._block):
                self._fetch(wanted - done)
                at = 0
            piece = self._block[at : at + wanted - done]
            target[done : done + len(piece)] = piece
            done += len(piece)
            self._position += len(piece)
        return done

    def _fetch(self, wanted_bytes: int) -> None:
        gap_bytes = self._position - (self._start + len(self._block))
        near = 0 <= gap_bytes <= self._gap_bytes
        self._ahead_bytes = min(2 * self._ahead_bytes, _MOST_BYTES) if near else _FIRST_BYTES
        left_bytes = self._entry.size_bytes - self._position
        length = min(max(wanted_bytes, self._ahead_bytes), left_bytes)
        self._start = self._position
        self._block = self._storage.read_range(self._entry.key, self._start, length)
