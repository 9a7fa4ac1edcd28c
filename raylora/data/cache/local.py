"""A bounded folder of memory-mapped Arrow files on the machine's own disk.

Many processes of a machine share one folder. A file appears whole under its final name or not at
all, and is never changed; the one not used for longest goes first. A file that is deleted while
somebody has it mapped stays readable to them until they let go of it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from raylora.base.errors import StorageError

_SUFFIX = ".arrow"
_TEMPORARY = ".tmp-"
# A temporary file lives for the seconds of one write; an older one belonged to a killed process.
_STALE_SECONDS = 600.0


def default_local_folder() -> Path:
    """`$RAYLORA_LOCAL_CACHE`, else a folder of this user below the temporary folder."""
    named = os.environ.get("RAYLORA_LOCAL_CACHE")
    return Path(named or Path(tempfile.gettempdir()) / f"raylora-cache-{os.getuid()}")


class LocalCache:
    """Tables by name in `folder`, at most `max_bytes` of them on disk.

    Raises:
        StorageError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        with _named_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def touch(self, name: str) -> bool:
        """Mark a table as just used; False when it has gone from the disk."""
        try:
            os.utime(self._path(name))
        except FileNotFoundError:
            return False
        return True

    def open(self, name: str) -> pa.Table | None:
        """The table, mapped and not read; None when it is not here."""
        if not self.touch(name):
            return None
        try:
            with pa.memory_map(str(self._path(name))) as mapped:
                return pa.ipc.open_file(mapped).read_all()
        except FileNotFoundError:
            return None
        except pa.ArrowInvalid:  # a power cut between rename and flush
            self._path(name).unlink(missing_ok=True)
            return None

    def put(self, name: str, table: pa.Table) -> pa.Table:
        """Keep a table, dropping others as needed; the same one, mapped.

        Its columns have one chunk each. One larger than the whole cache is handed back as it came.
        """
        temporary = self._folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
        with _named_errors(self._folder):
            try:
                with pa.ipc.new_file(str(temporary), table.schema) as writer:
                    writer.write_table(table)
                with self._locked():
                    if self._make_room(temporary.stat().st_size):
                        os.replace(temporary, self._path(name))
            finally:
                temporary.unlink(missing_ok=True)
        mapped = self.open(name)
        return table if mapped is None else mapped

    def _make_room(self, size_bytes: int) -> bool:
        """Delete the least recently used files until `size_bytes` more fit."""
        if size_bytes > self._max_bytes:
            return False
        files = []
        for item in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                status = item.stat()
                if item.name.endswith(_SUFFIX):
                    files.append((status.st_mtime_ns, status.st_size, item.path))
                elif item.name.startswith(_TEMPORARY):
                    _delete_stale(item.path, status.st_mtime)
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used + size_bytes <= self._max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time; the lock of a killed one frees itself."""
        with open(self._folder / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"


def _delete_stale(path: str, modified_seconds: float) -> None:
    if time.time() - modified_seconds > _STALE_SECONDS:
        Path(path).unlink(missing_ok=True)


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{folder}: the local cache cannot be written ({error.strerror or error}). Make room, "
            "lower data.local_cache_gib, or set RAYLORA_LOCAL_CACHE to another folder."
        ) from error
