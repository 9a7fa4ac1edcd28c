"""WebDataset tars as a folder: every member is an object that one ranged read fetches.

The table of a tar's members is learnt once, from its headers, and kept in the cache, so that no
other process, and no later run, reads the headers again.
"""

from __future__ import annotations

import tarfile
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylora.base.columns import Column
from raylora.base.errors import DataError, MissingObject, StorageError
from raylora.base.storage import Entry, Storage, checked_key, is_key, range_error
from raylora.data.cache.recipe import hash16
from raylora.data.pixels.decode import image_suffixes
from raylora.data.sources.file_columns import numbers, strings
from raylora.data.sources.notes import first_few, images_in_words
from raylora.data.sources.range_file import RangeFile

TAR_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"),
    *(".tar.lz4", ".tzst"),
)
_THREADS = 8
_BLOCK_BYTES = tarfile.BLOCKSIZE
_REMEDY = "Make the tar anew, or take it out of the folder."


def tars_folder(url: str) -> str:
    """The cache folder of the member tables of a folder of tars."""
    return f"tars-{hash16(url.encode())}"


class TarFolder(Storage):
    """Read-only view of the `*.tar` below a folder, at any depth: `shard-000.tar/name.jpg`.

    Symbolic links, and names that no storage could have, are left out. Of members of one name the
    last one counts. The tables of the tars in use are held: some 50 bytes for each member.

    Args:
        folder: where the tars are.
        cache: keeps the tables of members, below `tars_folder`.
    """

    def __init__(self, folder: Storage, cache: Storage) -> None:
        self.url = folder.url
        self.notes: tuple[str, ...] = ()
        """What the last `scan` left out, in sentences."""
        self._folder, self._cache = folder, cache
        self._known: dict[str, tuple[Entry, _Members]] = {}

    def read(self, key: str) -> bytes:
        tar, offset, size = self._place(key)
        return self._folder.read_range(tar.key, offset, size)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        tar, offset, size = self._place(key)
        if start + length > size:
            raise range_error(f"{self.url}/{key}", start, length, size)
        return self._folder.read_range(tar.key, offset + start, length)

    def entries(self, prefix: str = "") -> list[Entry]:
        return list(self.scan(prefix))

    def scan(self, prefix: str = "") -> Iterator[Entry]:
        """Members in order of key. The headers of new tars are read, of several at a time.

        Raises:
            DataError: a tar is broken.
        """
        wanted = f"{checked_key(prefix.removesuffix('/'))}/" if prefix else ""
        for tar, members in self._tables(wanted):
            for name, offset, size in members:
                key = f"{tar.key}/{name}"
                if key.startswith(wanted):
                    yield Entry(key, size, _tag(tar, offset))

    def entry(self, key: str) -> Entry | None:
        try:
            tar, offset, size = self._place(key)
        except MissingObject:
            return None
        return Entry(key, size, _tag(tar, offset))

    def within(self, prefix: str) -> TarFolder:
        """A folder of tars below; the inside of a tar is no place of its own."""
        folder = checked_key(prefix.removesuffix("/"))
        if any(part.lower().endswith(TAR_SUFFIX) for part in folder.split("/")):
            raise StorageError(f"{self.url}/{folder}: a tar's inside cannot be opened as a folder.")
        return TarFolder(self._folder.within(folder), self._cache)

    def write(self, key: str, data: bytes) -> None:
        self._refuse(key)

    def create(self, key: str, data: bytes) -> bool:
        self._refuse(key)

    def delete(self, key: str) -> None:
        self._refuse(key)

    def _refuse(self, key: str) -> NoReturn:
        raise StorageError(f"{self.url}/{key}: tars are only read. Write beside them.")

    def __reduce__(self) -> tuple[Callable[[Storage, Storage], Storage], tuple[Storage, Storage]]:  # type: ignore[override]
        return TarFolder, (self._folder, self._cache)

    def __repr__(self) -> str:
        return f"TarFolder({self._folder!r}, {self._cache!r})"

    def _tables(self, wanted: str) -> Iterator[tuple[Entry, _Members]]:
        suffixes = tuple(image_suffixes())
        tars: list[Entry] = []
        compressed: list[str] = []
        beside = 0
        for entry in self._folder.scan():
            name = entry.key.lower()
            if name.endswith(COMPRESSED_SUFFIXES):
                compressed.append(entry.key)
            elif name.endswith(TAR_SUFFIX):
                inside = f"{entry.key}/"
                if inside.startswith(wanted) or wanted.startswith(inside):
                    tars.append(entry)
            else:
                beside += name.endswith(suffixes)
        self.notes = tuple(_left_out(compressed, beside))
        tars.sort(key=lambda tar: f"{tar.key}/")
        pool = ThreadPoolExecutor(_THREADS)
        try:
            yield from zip(tars, pool.map(self._members, tars), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)

    def _place(self, key: str) -> tuple[Entry, int, int]:
        """(tar, first byte, size) of a member."""
        parts = checked_key(key).split("/")
        for count in range(1, len(parts)):
            if not parts[count - 1].lower().endswith(TAR_SUFFIX):
                continue
            name, inside = "/".join(parts[:count]), "/".join(parts[count:])
            known = self._known.get(name)
            tar = known[0] if known else self._folder.entry(name)
            place = self._members(tar).find(inside) if tar else None
            if tar and place:
                return tar, *place
        raise MissingObject(f"{self.url}/{key}: there is no such member of a tar. Check the name.")

    def _members(self, tar: Entry) -> _Members:
        known = self._known.get(tar.key)
        if known and known[0] == tar:
            return known[1]
        # Two threads may both learn the same; they learn the same.
        members = self._kept_members(tar)
        self._known[tar.key] = tar, members
        return members

    def _kept_members(self, tar: Entry) -> _Members:
        what = f"{self.url}/{tar.key}\n{tar.size_bytes}\n{tar.tag}"
        key = f"{tars_folder(self.url)}/{hash16(what.encode())}.parquet"
        try:
            return _Members.from_parquet(self._cache.read(key))
        except (MissingObject, pa.ArrowException):  # new, or half of it was lost with a disk
            pass
        members = _Members.of(read_members(self._folder, tar))
        self._cache.write(key, members.to_parquet())
        return members


@dataclass(frozen=True)
class _Members:
    """Members of one tar, sorted by name; Arrow arrays."""

    names: Column
    offsets: Column
    sizes: Column

    @staticmethod
    def of(found: dict[str, tuple[int, int]]) -> _Members:
        names = sorted(found)
        places = np.array([found[name] for name in names], np.int64).reshape(-1, 2)
        return _Members(strings(names), numbers(places[:, 0]), numbers(places[:, 1]))

    @staticmethod
    def from_parquet(data: bytes) -> _Members:
        table = pq.ParquetFile(pa.BufferReader(data)).read().combine_chunks()
        if not len(table):
            return _Members.of({})
        return _Members(*(table[name].chunk(0) for name in ("name", "offset", "size")))

    def to_parquet(self) -> bytes:
        columns = [self.names, self.offsets, self.sizes]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_arrays(columns, ["name", "offset", "size"]), sink)
        return bytes(sink.getvalue())

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        columns = (self.names, self.offsets, self.sizes)
        for start in range(0, len(self.names), 4096):
            yield from zip(*(c.slice(start, 4096).to_pylist() for c in columns), strict=True)

    def find(self, name: str) -> tuple[int, int] | None:
        """(first byte, size)."""
        row = bisect_left(self.names, name, key=lambda value: value.as_py())
        if row == len(self.names) or self.names[row].as_py() != name:
            return None
        return self.offsets[row].as_py(), self.sizes[row].as_py()


def read_members(folder: Storage, tar: Entry) -> dict[str, tuple[int, int]]:
    """The files in a tar: name -> (first byte, size), learnt from its headers alone.

    Raises:
        DataError: it is no tar, or broken, or cut short.
    """
    place = f"{folder.url}/{tar.key}"
    found: dict[str, tuple[int, int]] = {}
    file = RangeFile(folder, tar)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            last = -1
            while (member := archive.next()) is not None:
                # tarfile would keep a kilobyte for each of a million members.
                archive.members.clear()  # type: ignore[attr-defined]
                if archive.offset <= last:
                    raise DataError(f"{place}: broken; a member's size is wrong. {_REMEDY}")
                last = archive.offset
                _take(member, found)
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(
            f"{place}: cannot be read as a tar ({error}); it is broken, cut short or compressed. "
            f"{_REMEDY}"
        ) from error
    # tarfile stops in silence at a header that it cannot read.
    file.seek(end)
    block = file.read(_BLOCK_BYTES) or b""
    if block.strip(b"\0") or len(block) % _BLOCK_BYTES:
        raise DataError(f"{place}: broken after {len(found)} members, at byte {end}. {_REMEDY}")
    return found


def _left_out(compressed: list[str], beside: int) -> Iterator[str]:
    if compressed:
        yield (
            f"compressed tars are not read: {first_few(compressed)}. Decompress them; images "
            "hardly shrink in them."
        )
    if beside:
        yield f"{images_in_words(beside)} beside the tars not used. Pack them, or give them a set."


def _take(member: tarfile.TarInfo, found: dict[str, tuple[int, int]]) -> None:
    name = _clean(member.name)
    if not is_key(name):
        return
    target = _clean(member.linkname)
    if member.islnk() and target in found:  # tar packs a file that has two names once
        found[name] = found[target]
    elif member.isreg() and not member.issparse():
        found[name] = (member.offset_data, member.size)


def _clean(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _tag(tar: Entry, offset: int) -> str:
    return f"{tar.tag}+{offset}"
