"""Host memory that weights and inputs of a device wait in.

Page-locked where there is CUDA, so that copies run beside the computing. A copy of frozen weights
is the same for all processes of a machine, so they may have one together.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from raylora.base.log import get_logger
from raylora.memory.shared_host import SharedFolder, remove_abandoned

log = get_logger("memory")

SHARED_ROOT = Path("/dev/shm")
Fill = Callable[[Tensor], None]
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device of the process
_host: dict[int, weakref.ref[torch.UntypedStorage]] = {}


def lies_on_host(storage: torch.UntypedStorage) -> bool:
    """Whether a storage is host memory on purpose, also where the device is the CPU."""
    return storage._cdata in _host


def host_tensor(shape: Sequence[int], dtype: torch.dtype, *, meta: bool = False) -> Tensor:
    """A tensor of host memory, its numbers not set.

    Args:
        meta: of a model without numbers, whose bytes are counted alone.
    """
    with _disable_current_modes():  # whoever counts would count it before it is known as the host's
        if meta:
            return as_host(torch.empty(tuple(shape), dtype=dtype, device="meta"))
        pinned = torch.cuda.is_available()
        return as_host(torch.empty(tuple(shape), dtype=dtype, pin_memory=pinned))


def as_host(tensor: Tensor) -> Tensor:
    """The same tensor, whose storage `lies_on_host` from now on."""
    storage = tensor.untyped_storage()
    key = storage._cdata
    _host[key] = weakref.ref(storage, lambda gone: _host.pop(key, None))
    return tensor


class HostMemory:
    """Buffers of host memory by key.

    With a name there is one copy of each for all processes of the machine that give the same name,
    made by the first one that asks; the last one out removes it.

    Args:
        name: says what is in the buffers, so that others may rely on it: the weights' fingerprint,
            their dtype and how they are held. None shares nothing.
        root: a file system in memory.
    """

    def __init__(self, name: str | None = None, *, root: Path = SHARED_ROOT) -> None:
        remove_abandoned(root)
        self._folder = None if name is None else _shared_folder(root, name)
        self._held: dict[str, Tensor] = {}
        self._locked: dict[str, int] = {}
        # Pages that stay locked behind their mapping could not be locked again.
        weakref.finalize(self, _unlock_pages, self._locked).atexit = False

    @property
    def bytes(self) -> int:
        """Of all buffers, shared ones too."""
        return sum(held.nbytes for held in self._held.values())

    @property
    def shared(self) -> bool:
        """Whether the next buffer is made for all processes of the machine."""
        return self._folder is not None

    def buffer(self, key: str, bytes_: int, fill: Fill) -> Tensor:
        """The buffer of a key, (bytes,) uint8, page-aligned.

        Args:
            fill: writes all of it; called where no other process did.
        """
        if key in self._held:
            return self._held[key]
        with _disable_current_modes():
            held = self._shared(key, bytes_, fill)
            if held is None:
                held = self._private(key, bytes_)
                fill(held)
            self._held[key] = as_host(held)
        return held

    def free(self, key: str) -> None:
        """Give a buffer back; no copy from it may be on its way."""
        _unlock_pages(self._locked, key)
        del self._held[key]

    def close(self) -> None:
        """Give all back, and leave the others; no copy may be on its way."""
        for key in list(self._held):
            self.free(key)
        if self._folder is not None:
            self._folder.leave()
            self._folder = None

    def _shared(self, key: str, bytes_: int, fill: Fill) -> Tensor | None:
        if self._folder is None:
            return None
        try:
            shared = self._folder.tensor(key, bytes_, fill)
        except OSError as error:
            _tell(str(error))
            self._folder.leave()
            self._folder = None
            return None
        if self._lock_pages(key, shared):
            return shared
        _tell("CUDA does not lock its pages")
        private = self._private(key, bytes_)
        return private.copy_(shared)

    def _private(self, key: str, bytes_: int) -> Tensor:
        # Pages of its own: torch's allocator of page-locked memory takes the next power of two.
        held = torch.frombuffer(mmap.mmap(-1, bytes_), dtype=torch.uint8)
        if not self._lock_pages(key, held):
            log.warning("CUDA does not lock %d bytes of host memory: copies from them wait", bytes_)
        return held

    def _lock_pages(self, key: str, held: Tensor) -> bool:
        """Whether they are locked, or need not be."""
        if not torch.cuda.is_available():
            return True
        said = torch.cuda.cudart().cudaHostRegister(held.data_ptr(), held.nbytes, _PORTABLE)
        if int(said) == 0:
            self._locked[key] = held.data_ptr()
            return True
        with suppress(RuntimeError):  # the next launch reports the error; let it be this one
            torch.zeros(1, device="cuda").add_(1)
        return False


def _unlock_pages(locked: dict[str, int], only: str | None = None) -> None:
    for key in [key for key in locked if only in (None, key)]:
        torch.cuda.cudart().cudaHostUnregister(locked.pop(key))


def _shared_folder(root: Path, name: str) -> SharedFolder | None:
    try:
        return SharedFolder(root, name)
    except OSError as error:
        _tell(str(error))
        return None


def _tell(why: str) -> None:
    log.warning("no host memory is shared with other processes of this machine: %s", why)
