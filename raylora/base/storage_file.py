"""Storage in a folder of a disk, local or shared, on POSIX systems."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raylora.base.errors import MissingObject, StorageError
from raylora.base.storage import Entry, Storage, checked_key, is_key, range_error
from raylora.base.units import gib

# What network and container mounts without hard links answer to one.
_NO_HARD_LINKS = {
    errno.EPERM,
    errno.EACCES,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EMLINK,
}


class FileStorage(Storage):
    """Objects are files below `folder`.

    A write goes to a hidden temporary file in the same folder, is flushed to the disk and then
    renamed, so a killed writer leaves at most a hidden file that nobody reads.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(os.path.normpath(folder))
        self.url = f"file://{self.folder}"

    def read(self, key: str) -> bytes:
        with self._named_errors("read", key):
            return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with self._named_errors("read", key), open(self._path(key), "rb") as file:
            file.seek(start)
            data = file.read(length)
            size = os.fstat(file.fileno()).st_size
        if len(data) != length:
            raise range_error(f"{self.url}/{key}", start, length, size)
        return data

    def write(self, key: str, data: bytes) -> None:
        with self._named_errors("write", key):
            path = self._path(key)
            with _temporary(path.parent, data) as temporary:
                os.replace(temporary, path)
            _flush_folder(path.parent)

    def create(self, key: str, data: bytes) -> bool:
        with self._named_errors("write", key):
            path = self._path(key)
            if path.exists():
                return False
            with _temporary(path.parent, data) as temporary:
                created = _link_or_rename(temporary, path)
            _flush_folder(path.parent)
            return created

    def entries(self, prefix: str = "") -> list[Entry]:
        return list(self.scan(prefix))

    def scan(self, prefix: str = "") -> Iterator[Entry]:
        folder = str(self._path(prefix.removesuffix("/")) if prefix else self.folder)
        with self._named_errors("list", prefix):
            for path in _files_below(folder):
                key = path[len(str(self.folder)) :].lstrip("/")
                if not is_key(key):  # nobody could read it
                    continue
                try:
                    status = os.stat(path)
                except FileNotFoundError:  # deleted since its folder was read
                    continue
                yield Entry(key, status.st_size, str(status.st_mtime_ns))

    def entry(self, key: str) -> Entry | None:
        path = self._path(key)
        with self._named_errors("look at", key), suppress(FileNotFoundError, NotADirectoryError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                return Entry(key, status.st_size, str(status.st_mtime_ns))
        return None

    def delete(self, key: str) -> None:
        with self._named_errors("delete", key), suppress(FileNotFoundError, NotADirectoryError):
            self._path(key).unlink()

    def within(self, prefix: str) -> FileStorage:
        return FileStorage(str(self._path(prefix.removesuffix("/"))))

    def _check_in(self, folder: str) -> None:
        super()._check_in(folder)
        shutil.rmtree(self._path(folder), ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / checked_key(key)

    @contextmanager
    def _named_errors(self, verb: str, key: str) -> Iterator[None]:
        """Turn an operating system's error into a sentence that names the object."""
        place = f"{self.url}/{key}"
        try:
            yield
        except FileNotFoundError as error:
            raise MissingObject(f"{place}: there is no such file. Check the path.") from error
        except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
            raise StorageError(
                f"{place}: a file and a folder want the same name ({error.strerror}). Rename one."
            ) from error
        except PermissionError as error:
            raise StorageError(
                f"{place}: not allowed to {verb} it ({error.strerror}). Change its owner or mode, "
                "or choose another place."
            ) from error
        except OSError as error:
            raise StorageError(
                f"{place}: could not {verb} it ({error.strerror}); {_free(self.folder)}. "
                "Make room, look at the disk, or choose another place."
            ) from error


@contextmanager
def _temporary(folder: Path, data: bytes) -> Iterator[Path]:
    """A hidden file that holds `data` and has reached the disk; gone at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".tmp-{uuid.uuid4().hex}"
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _link_or_rename(temporary: Path, path: Path) -> bool:
    """Give the finished file its name, unless that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _rename_under_lock(temporary, path)
    return True


def _rename_under_lock(temporary: Path, path: Path) -> bool:
    """As a hard link would: one of many callers wins, and the lock of a killed one frees itself."""
    import fcntl

    with open(path.parent / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return False
        os.replace(temporary, path)
        return True


def _flush_folder(folder: Path) -> None:
    """Make a new name survive a power cut; some network mounts cannot, and need not."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _files_below(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Paths of all files that are not hidden, in order; through linked folders too, unless a link
    leads back up."""
    try:
        status = os.stat(folder)
        names = _names_in(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for name in names:
        if name.endswith("/"):
            yield from _files_below(os.path.join(folder, name[:-1]), (*above, here))
        else:
            yield os.path.join(folder, name)


def _names_in(folder: str) -> list[str]:
    """Files and folders directly in a folder; a folder's name ends in '/', to sort as keys do."""
    names = []
    with os.scandir(folder) as items:
        for item in items:
            if item.name.startswith("."):
                continue
            if item.is_dir():
                names.append(f"{item.name}/")
            elif item.is_file():
                names.append(item.name)
    return sorted(names)


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return f"{gib(status.f_bavail * status.f_frsize)} are free there"
