"""Probing this machine, and reading control groups of machines that are written down."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from raylora.base.units import GIB
from raylora.memory.card import Card
from raylora.memory.options import MemoryOptions
from raylora.memory.probe import free_host_bytes, probe, probe_links

KIB = 1024


def write(root: Path, files: dict[str, str]) -> Path:
    """A machine whose /proc and /sys say so."""
    for path, text in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return root


def meminfo(gib: float) -> dict[str, str]:
    free = int(gib * GIB / KIB)
    return {"proc/meminfo": f"MemTotal: {4 * free} kB\nMemAvailable:   {free} kB\nBuffers: 1 kB\n"}


def group(folder: str, most: str, used: int, *, inactive: int = 0) -> dict[str, str]:
    """Of version 2."""
    return {
        f"{folder}/memory.max": f"{most}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 1\ninactive_file {inactive}\n",
    }


def test_a_cpu_is_probed_within_a_second_as_what_it_has() -> None:
    began = time.perf_counter()
    found = probe(torch.device("cpu"), options=MemoryOptions())
    assert time.perf_counter() - began < 2.0  # 0.1 s where nothing else runs
    assert found.capability is None
    assert not found.limited
    assert found.total_bytes == found.host_bytes > 0
    assert found.float_tflops > 0
    assert found.bandwidth_gbs > 0
    assert found.to_device_gbs > 0
    assert Card.from_plain(found.plain()) == found


def test_a_budget_is_all_that_a_cpu_has() -> None:
    found = probe(torch.device("cpu"), options=MemoryOptions(budget_gib=0.25, reserve_gib=0))
    assert found.total_bytes == GIB // 4
    assert found.limited
    assert found.host_bytes > GIB // 4


def test_what_is_free_is_what_the_machine_says_where_nothing_limits_it(tmp_path: Path) -> None:
    root = write(tmp_path, meminfo(10) | {"proc/self/cgroup": "0::/\n"})
    assert free_host_bytes(root) == 10 * GIB
    unlimited = write(root, group("sys/fs/cgroup", "max", GIB))
    assert free_host_bytes(unlimited) == 10 * GIB


def test_a_group_of_version_2_limits_it_and_gives_back_files_not_in_use(tmp_path: Path) -> None:
    files = meminfo(10) | {"proc/self/cgroup": "0::/job\n"}
    inner = group("sys/fs/cgroup/job", str(4 * GIB), 3 * GIB, inactive=GIB // 2)
    assert free_host_bytes(write(tmp_path, files | inner)) == GIB + GIB // 2


def test_a_group_further_up_limits_it_too(tmp_path: Path) -> None:
    files = meminfo(10) | {"proc/self/cgroup": "0::/pod/job\n"}
    files |= group("sys/fs/cgroup/pod/job", "max", GIB)
    files |= group("sys/fs/cgroup/pod", str(3 * GIB), 2 * GIB)
    assert free_host_bytes(write(tmp_path, files)) == GIB


def test_a_container_that_is_told_the_hosts_path_reads_its_own_mount(tmp_path: Path) -> None:
    files = meminfo(10) | {"proc/self/cgroup": "0::/system.slice/docker-1234.scope\n"}
    files |= group("sys/fs/cgroup", str(2 * GIB), GIB)
    assert free_host_bytes(write(tmp_path, files)) == GIB


@pytest.mark.parametrize(("limit", "expected"), [(3 * GIB, 2 * GIB), (2**63 - 4096, 10 * GIB)])
def test_groups_of_version_1_are_read(tmp_path: Path, limit: int, expected: int) -> None:
    folder = "sys/fs/cgroup/memory/job"
    files = meminfo(10) | {
        "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n",
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{2 * GIB}\n",
        f"{folder}/memory.stat": f"cache 1\ntotal_inactive_file {GIB}\n",
    }
    assert free_host_bytes(write(tmp_path, files)) == expected


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    files = meminfo(10) | {"proc/self/cgroup": "0::/job\n"}
    files |= group("sys/fs/cgroup/job", str(GIB), 2 * GIB)
    assert free_host_bytes(write(tmp_path, files)) == 0


def test_this_machine_has_memory_and_no_pairs_of_one_gpu() -> None:
    assert free_host_bytes() > 0
    links = probe_links()
    assert len(links.peers) <= links.devices * (links.devices - 1)
