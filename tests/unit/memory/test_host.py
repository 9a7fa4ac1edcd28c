"""Host memory: one copy for all processes, whole or not at all, and none left behind."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from children import Child
from torch import Tensor

from raylora.memory import shared_host
from raylora.memory.host import HostMemory, host_tensor, lies_on_host
from raylora.memory.tracker import PeakTracker

BYTES = 3 * 4096 + 5


def count_up(buffer: Tensor) -> None:
    buffer.copy_(torch.arange(BYTES).to(torch.uint8))


def refuse(buffer: Tensor) -> None:
    raise AssertionError("somebody else has filled it")


def counted(buffer: Tensor) -> bool:
    return torch.equal(buffer, torch.arange(BYTES).to(torch.uint8))


def in_child(root: Path, ready: Path, leave: Path) -> bool:
    """Reads what the parent has filled, and stays until it is told to leave."""
    memory = HostMemory("one", root=root)
    right = counted(memory.buffer("a", BYTES, refuse))
    ready.touch()
    while not leave.exists():
        time.sleep(0.005)
    memory.close()
    return right


def killed_while_filling(root: Path, begun: Path) -> None:
    def fill(buffer: Tensor) -> None:
        buffer.fill_(7)
        begun.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    HostMemory("one", root=root).buffer("a", BYTES, fill)


def killed_when_filled(root: Path) -> None:
    memory = HostMemory("one", root=root)
    memory.buffer("a", BYTES, count_up)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_buffer_is_filled_once_and_kept_by_its_key():
    memory = HostMemory()
    first = memory.buffer("a", BYTES, count_up)
    assert counted(first)
    assert memory.buffer("a", BYTES, refuse) is first
    assert memory.bytes == BYTES
    assert first.data_ptr() % 4096 == 0
    memory.free("a")
    assert memory.bytes == 0


def test_host_memory_is_told_from_a_cpu_s_tensors_while_it_lives():
    held = host_tensor([3, 4], torch.float32)
    buffer = HostMemory().buffer("a", BYTES, count_up)
    assert lies_on_host(held.untyped_storage())
    assert lies_on_host(held[1:].T.untyped_storage())
    assert lies_on_host(buffer[5:].untyped_storage())
    assert not lies_on_host(held.clone().untyped_storage())
    assert lies_on_host(host_tensor([3], torch.float32, meta=True).untyped_storage())


@pytest.mark.slow
def test_host_memory_is_not_counted_as_the_device_s(tmp_path: Path):
    with PeakTracker() as tracker:
        held = host_tensor([1000], torch.float32)
        private = HostMemory().buffer("a", BYTES, count_up)
        shared = HostMemory("one", root=tmp_path).buffer("a", BYTES, count_up)
        assert tracker.peak_bytes == 0
        on_device = held.clone()
        assert tracker.now_bytes >= on_device.nbytes
    assert counted(private)
    assert counted(shared)


@pytest.mark.slow
def test_two_processes_have_one_copy_and_the_last_one_out_removes_it(tmp_path: Path):
    ready, leave, root = tmp_path / "ready", tmp_path / "leave", tmp_path / "shm"
    root.mkdir()
    memory = HostMemory("one", root=root)
    buffer = memory.buffer("a", BYTES, count_up)
    child = Child(in_child, root, ready, leave)
    while not ready.exists() and child.running(0):
        time.sleep(0.005)
    memory.close()
    assert counted(buffer), "what is mapped stays"
    assert len(list(root.iterdir())) == 1, "the child is in it still"
    leave.touch()
    assert child.result()
    assert not list(root.iterdir())


def test_names_and_keys_and_sizes_are_kept_apart(tmp_path: Path):
    first, other = HostMemory("one", root=tmp_path), HostMemory("two", root=tmp_path)
    a = first.buffer("a", BYTES, lambda buffer: buffer.fill_(1))
    b = first.buffer("b", BYTES, lambda buffer: buffer.fill_(2))
    longer = HostMemory("one", root=tmp_path).buffer("a", BYTES + 1, lambda one: one.fill_(3))
    c = other.buffer("a", BYTES, lambda buffer: buffer.fill_(4))
    assert [int(held.unique()) for held in (a, b, longer, c)] == [1, 2, 3, 4]
    first.close()
    other.close()


def test_a_process_that_is_killed_while_it_fills_keeps_nobody_waiting(tmp_path: Path):
    begun, root = tmp_path / "begun", tmp_path / "shm"
    root.mkdir()
    child = Child(killed_while_filling, root, begun)
    while not begun.exists():
        time.sleep(0.005)
    memory = HostMemory("one", root=root)
    assert counted(memory.buffer("a", BYTES, count_up)), "half a fill is no fill"
    child.process.join()
    memory.close()
    assert not list(root.iterdir())


def test_what_killed_processes_leave_is_removed_by_the_next(tmp_path: Path):
    Child(killed_when_filled, tmp_path).process.join()
    assert len(list(tmp_path.iterdir())) == 1
    used = HostMemory("used", root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    HostMemory(root=tmp_path)  # whether it shares anything itself or not
    assert len(list(tmp_path.iterdir())) == 1
    used.close()
    assert not list(tmp_path.iterdir())


def test_a_fill_that_fails_leaves_no_file_and_is_tried_again(tmp_path: Path):
    memory = HostMemory("one", root=tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        memory.buffer("a", BYTES, _no_memory)
    assert counted(memory.buffer("a", BYTES, count_up))


def _no_memory(buffer: Tensor) -> None:
    raise torch.OutOfMemoryError("while filling")


def test_too_little_room_falls_back_to_private_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(path: Path, bytes_: int) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared_host, "_reserve", full)
    memory = HostMemory("one", root=tmp_path)
    assert memory.shared
    with caplog.at_level("WARNING", logger="raylora"):
        assert counted(memory.buffer("a", BYTES, count_up))
    assert not memory.shared
    assert "no host memory is shared" in caplog.text
    assert "No space left" in caplog.text
    assert not list(tmp_path.iterdir())
    assert counted(memory.buffer("b", BYTES, count_up))


def test_room_is_really_asked_for(tmp_path: Path):
    with pytest.raises(OSError):
        shared_host._reserve(tmp_path / "file", 2**60)


def test_no_place_in_memory_falls_back_to_private_memory(tmp_path: Path):
    (tmp_path / "file").touch()
    memory = HostMemory("one", root=tmp_path / "file")
    assert not memory.shared
    assert counted(memory.buffer("a", BYTES, count_up))


def test_a_folder_that_is_removed_while_it_is_joined_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The last one out may be between our opening its lock and our having it."""
    last = HostMemory("one", root=tmp_path)
    last.buffer("a", BYTES, lambda buffer: buffer.fill_(1))
    flock, leaving = shared_host.fcntl.flock, [last]

    def late(file: int, how: int) -> None:
        if how == shared_host.fcntl.LOCK_SH and leaving:
            leaving.pop().close()
        flock(file, how)

    monkeypatch.setattr(shared_host.fcntl, "flock", late)
    memory = HostMemory("one", root=tmp_path)
    assert counted(memory.buffer("a", BYTES, count_up))
    another = HostMemory("one", root=tmp_path)
    assert counted(another.buffer("a", BYTES, refuse))
