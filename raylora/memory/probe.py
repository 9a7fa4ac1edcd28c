"""What a device has: memory and copies, measured in about half a second, and how fast it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylora.base.units import GIB
from raylora.memory.card import BF16, Card
from raylora.memory.cards import KNOWN, known_name
from raylora.memory.options import MemoryOptions

COPY_BYTES = 2**26
"""Of one copy between host and device: far above what starting one costs."""
COPY_SECONDS = 0.1
PRODUCT_SECONDS = 0.03
REACHED = 0.75
"""Of what a vendor says, what large products and copies reach; assumed."""
_SIDE = 4096
"""Of matrices whose product shows what a GPU reaches; on a CPU an eighth of it."""
_NO_LIMIT = 2**60
"""What a control group of version 1 says where it has none is near 2^63."""


def probe(device: torch.device, *, options: MemoryOptions) -> Card:
    """The card of a device as it is now.

    On a CPU, `memory.budget_gib` is what there is, where it is set.
    """
    return _probe_cuda(device) if device.type == "cuda" else _probe_cpu(options)


def _probe_cuda(device: torch.device) -> Card:
    facts = torch.cuda.get_device_properties(device)
    torch.cuda.synchronize(device)  # makes the context, whose part is not free any more
    free, total = torch.cuda.mem_get_info(device)
    half, single, bandwidth = _figures(facts, device, free)
    to_device, to_host = _copies(device, free)
    torch.cuda.empty_cache()
    return Card(
        name=facts.name,
        total_bytes=total,
        free_bytes=free,
        host_bytes=free_host_bytes(),
        capability=(facts.major, facts.minor),
        half_tflops=half,
        float_tflops=single,
        bandwidth_gbs=bandwidth,
        to_device_gbs=to_device,
        to_host_gbs=to_host,
    )


def _figures(facts: Any, device: torch.device, free: int) -> tuple[float, float, float]:
    """TFLOP/s in 16 bits and in float32, and GB/s: the vendor's, or as measured where unknown.

    The vendor's are preferred, so that a plan is the same with the card and without it.
    """
    if name := known_name(facts.name):
        known = KNOWN[name]
        return known.half_tflops, known.float_tflops, known.bandwidth_gbs
    half = torch.bfloat16 if (facts.major, facts.minor) >= BF16 else torch.float16
    seconds = partial(_seconds_on, device)
    side = _SIDE if free > GIB else _SIDE // 4
    products = [_tflops(side, dtype, device, seconds) for dtype in (half, torch.float32)]
    one, other = torch.zeros((2, _copied(free)), dtype=torch.uint8, device=device)
    # It reads and writes.
    moved = 2 * len(one) / seconds(lambda: other.copy_(one), PRODUCT_SECONDS) / 1e9
    return products[0] / REACHED, products[1] / REACHED, moved / REACHED


def _copies(device: torch.device, free: int) -> tuple[float, float]:
    """GB/s of pinned copies to the device and back."""
    here = torch.zeros(_copied(free), dtype=torch.uint8, pin_memory=True)
    there = torch.zeros_like(here, device=device)

    def there_from_here() -> Tensor:
        return there.copy_(here, non_blocking=True)

    def here_from_there() -> Tensor:
        return here.copy_(there, non_blocking=True)

    to_device = _seconds_on(device, there_from_here, COPY_SECONDS)
    to_host = _seconds_on(device, here_from_there, COPY_SECONDS)
    return len(here) / to_device / 1e9, len(here) / to_host / 1e9


def _copied(free: int) -> int:
    """Bytes of a copy: few on a card that is nearly full, for a probe must not run out."""
    return min(COPY_BYTES, max(2**20, free // 16))


def _seconds_on(device: torch.device, action: Callable[[], Tensor], budget: float) -> float:
    """Of an action on a GPU, by its own clock, repeated for about as long as the budget."""
    with torch.cuda.device(device):
        action()  # what is made once
        once = _timed_on(device, action, 1)
        return _timed_on(device, action, max(1, min(200, int(budget / max(once, 1e-6)))))


def _timed_on(device: torch.device, action: Callable[[], Tensor], times: int) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(times):
        action()
    ended.record()
    torch.cuda.synchronize(device)
    return float(began.elapsed_time(ended)) / 1000 / times


def _tflops(
    side: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: Callable[[Callable[[], Tensor], float], float],
) -> float:
    left, right, out = torch.zeros((3, side, side), dtype=dtype, device=device)
    # Numbers, not zeros: a GPU multiplies zeros with less power, and so faster.
    left += torch.arange(side, device=device, dtype=torch.float32).remainder(7).to(dtype) - 3
    right += torch.arange(side, device=device, dtype=torch.float32).remainder(5).to(dtype) - 2
    taken = seconds(lambda: torch.mm(left, right, out=out), PRODUCT_SECONDS)
    return 2 * side**3 / taken / 1e12


def _probe_cpu(options: MemoryOptions) -> Card:
    host = free_host_bytes()
    total = host if options.budget_gib is None else int(options.budget_gib * GIB)
    source = torch.zeros(COPY_BYTES // 4, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = len(source) / _seconds(lambda: target.copy_(source), PRODUCT_SECONDS) / 1e9
    products = _tflops(_SIDE // 8, torch.float32, torch.device("cpu"), _seconds)
    return Card(
        name="CPU",
        total_bytes=total,
        free_bytes=None,
        host_bytes=host,
        capability=None,
        half_tflops=products,
        float_tflops=products,
        bandwidth_gbs=2 * copied,
        to_device_gbs=copied,
        to_host_gbs=copied,
        limited=options.budget_gib is not None,
    )


def _seconds(action: Callable[[], Tensor], budget: float) -> float:
    """Of an action on the CPU: the fastest of those that the budget has time for."""
    fastest, end = float("inf"), time.perf_counter() + budget
    while True:
        began = time.perf_counter()
        action()
        ended = time.perf_counter()
        fastest = min(fastest, ended - began)
        if ended >= end:
            return max(fastest, 1e-9)


@dataclass(frozen=True)
class Links:
    """GPUs of this machine.

    Attributes:
        devices: how many.
        peers: pairs that read one another's memory.
    """

    devices: int
    peers: tuple[tuple[int, int], ...]


def probe_links() -> Links:
    """How many GPUs there are, and which see one another."""
    count = torch.cuda.device_count()
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    return Links(count, tuple(p for p in pairs if torch.cuda.can_device_access_peer(*p)))


def free_host_bytes(root: Path = Path("/")) -> int:
    """Host memory that this process may still take, by the machine and by its control groups."""
    return max(0, min([_machine_bytes(root), *_group_bytes(root)]))


def _machine_bytes(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: all that there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return int(found["MemAvailable"].split()[0]) * 1024


def _group_bytes(root: Path) -> Iterator[int]:
    """What each control group that this process is in, and each above it, leaves free."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            words = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            words = (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        mount, *names = words
        top = root / mount
        own = top / path.strip("/")
        # Within a container the path may be the host's, and the mount the container's own.
        folders = [own, *own.parents] if own.is_dir() else [top]
        for folder in folders:
            if folder == top or top in folder.parents:
                free = _left_in(folder, *names)
                if free is not None:
                    yield free


def _left_in(folder: Path, limit: str, usage: str, reclaimed: str) -> int | None:
    """Bytes that a control group leaves; None where it has no limit."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return None
    if most == "max" or int(most) >= _NO_LIMIT:
        return None
    # Files that were read and are not in use go when memory is asked for.
    held = dict(line.split() for line in stat)
    return int(most) - used + int(held.get(reclaimed, 0))
