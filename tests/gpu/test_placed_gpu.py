"""Placed models on a GPU: the plain run's bits whatever the streams do, and the memory promised."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raylora.base.unit import Unit
from raylora.memory.host import HostMemory
from raylora.memory.offload import Away
from raylora.memory.placed import Placed
from raylora.memory.setting import Setting
from raylora.memory.stream import Ring

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
GPU = torch.device("cuda")
MIB = 2**20
DTYPE = torch.bfloat16
SLEEP = 3_000_000  # clock ticks: some two milliseconds
SETTINGS = [
    Setting("mlp"),
    Setting("alternate"),
    Setting("all"),
    Setting(streamed=0.3),
    Setting(streamed=0.5),
    Setting(streamed=1.0),
    Setting("all", offload=True),
    Setting("all", streamed=1.0, offload=True),
    Setting("alternate", streamed=0.3, offload=True),
]


class Wide(nn.Module):
    """A block of 2 * width * inner numbers, with a trained one."""

    def __init__(self, width: int, inner: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.to(DTYPE).requires_grad_(False)
        for weight in self.parameters():
            weight.normal_(0.0, 0.02, generator=generator)
        self.trained = torch.ones(width, dtype=DTYPE, device=GPU, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(self.norm(x)) * self.trained
        return y


class Chain:
    """Blocks in a row, placed; weights begin on the CPU."""

    def __init__(self, setting: Setting, *, blocks: int = 7, width: int = 256, inner: int = 1024):
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(*(Wide(width, inner + 64 * n, generator) for n in range(blocks)))
        units = [Unit(f"chain.{n}", one, (one.mlp,)) for n, one in enumerate(self.model)]  # type: ignore[arg-type]
        self.placed = Placed(self.model, units, device=GPU)
        self.width = width
        self.placed.apply(setting)

    def given(self, rows: int) -> Tensor:
        numbers = torch.arange(rows * self.width, device=GPU, dtype=torch.float32)
        return torch.sin(numbers).view(rows, self.width).to(DTYPE)

    def step(self, x: Tensor) -> list[Tensor]:
        """Output and gradients, nothing waited for."""
        for block in self.model:
            block.trained.grad = None  # type: ignore[union-attr]
        y = self.model(x)
        y.sum().backward()
        return [y.detach(), *(block.trained.grad for block in self.model)]  # type: ignore[misc, union-attr]

    def look(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.model(x)
        return y


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(one, other), place


@contextmanager
def deterministic() -> Iterator[None]:
    """Attention and convolutions that give the same bits each time they run."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux1"])
def test_every_setting_gives_a_family_s_plain_bits(kind: str, dtype: torch.dtype):
    from bases import open_tiny
    from placed_models import open_placed

    with deterministic():
        tiny = open_placed(open_tiny(kind), device=GPU, dtype=dtype)
        wanted, looked = tiny.step(), tiny.look()
        for name, tensor in tiny.step().items():
            assert torch.equal(tensor, wanted[name]), f"{name}: the plain run repeats itself"
        for setting in SETTINGS:
            tiny.apply(setting)
            for _ in range(2):
                for name, tensor in tiny.step().items():
                    assert torch.equal(tensor, wanted[name]), (setting, name)
                assert torch.equal(tiny.look(), looked), setting
        tiny.close()


def test_bits_do_not_hang_on_which_stream_is_the_slower(monkeypatch: pytest.MonkeyPatch):
    plain = Chain(Setting())
    x = plain.given(512)
    wanted, looked = plain.step(x), plain.look(x)
    for slow in ("copies", "computing"):
        with monkeypatch.context() as patch:
            if slow == "copies":
                _slow_copies(patch)
            for setting in SETTINGS:
                chain = Chain(setting)
                if slow == "computing":
                    for block in chain.model:
                        block.mlp.register_forward_pre_hook(lambda *_: torch.cuda._sleep(SLEEP))  # type: ignore[attr-defined, union-attr]
                for _ in range(3):
                    same(chain.step(x), wanted)
                same([chain.look(x), chain.look(x)], [looked, looked])
                same(chain.step(x), wanted)
                chain.placed.close()


def _slow_copies(patch: pytest.MonkeyPatch) -> None:
    """Each copy begins late, so that whoever does not wait for it reads what was there before."""
    copy, bring, away = Ring._copy, Away._bring_back, Away._copy_away

    def slowed(call: Callable[..., Any], stream: Callable[[Any], Any]) -> Callable[..., Any]:
        def slow(one: Any, *arguments: Any) -> Any:
            with torch.cuda.stream(stream(one)):
                torch.cuda._sleep(SLEEP)  # type: ignore[attr-defined]
            return call(one, *arguments)

        return slow

    patch.setattr(Ring, "_copy", slowed(copy, lambda ring: ring._copies))
    patch.setattr(Away, "_bring_back", slowed(bring, lambda one: one._offload.copies))
    patch.setattr(Away, "_copy_away", slowed(away, lambda one: one._offload.copies))


def test_streamed_weights_leave_the_device_and_come_back():
    chain = Chain(Setting(), blocks=8, width=1024, inner=4096)
    before, weights = torch.cuda.memory_allocated(), chain.placed.resident_bytes
    chain.placed.apply(Setting(streamed=1.0))
    streamed = torch.cuda.memory_allocated()
    placed = chain.placed
    assert placed.streamed_bytes >= weights
    assert abs(before - weights + placed.ring_bytes - streamed) < MIB
    chain.placed.apply(Setting(streamed=0.5))
    half = torch.cuda.memory_allocated()
    assert abs(before - placed.streamed_bytes + placed.ring_bytes - half) < MIB
    chain.placed.apply(Setting())
    assert abs(torch.cuda.memory_allocated() - before) < MIB


def test_a_model_is_never_whole_on_the_device_while_it_is_placed():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chain = Chain(Setting(streamed=1.0), blocks=8, width=1024, inner=4096)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < chain.placed.ring_bytes + MIB
    assert chain.placed.ring_bytes < 0.3 * chain.placed.streamed_bytes


def test_offloaded_inputs_leave_the_device():
    rows, width = 16384, 1024
    peaks = []
    for setting in (Setting("all"), Setting("all", offload=True)):
        chain = Chain(setting, blocks=16, width=width, inner=512)
        x = chain.given(rows)
        chain.step(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda._sleep(50 * SLEEP)  # type: ignore[attr-defined] # the program runs ahead
        chain.step(x)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.memory_stats()["active_bytes.all.peak"] - before)
    input_bytes = rows * width * DTYPE.itemsize
    assert peaks[1] < peaks[0] - 8 * input_bytes


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_never_waits_for_the_device(setting: Setting):
    chain = Chain(setting)
    x = chain.given(512)
    for _ in range(3):  # the first ones make events, and page-locked memory for inputs
        chain.step(x)
        chain.look(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # the first time, nothing is free yet that the device has not used
            torch.cuda._sleep(100 * SLEEP)  # type: ignore[attr-defined]
            asleep = torch.cuda.Event()
            asleep.record()
            chain.step(x)
        assert not asleep.query(), "all was started while the device slept"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_copies_run_beside_the_computing():
    sizes: dict[str, Any] = {"blocks": 12, "width": 2048, "inner": 8192}
    chain = Chain(Setting("all"), **sizes)
    streamed = Chain(Setting("all", streamed=1.0), **sizes)
    ring: Any = streamed.placed._ring
    copies = _seconds(lambda: [ring._copy(n, n % 2) for n in range(12)])
    copies *= 2 * (12 - 2) / 12  # the two units that ran last are there at each turn
    for rows in (2**power for power in range(10, 17)):
        x = chain.given(rows)
        computing = _seconds(partial(chain.step, x))
        if computing > copies:  # so that there is something to hide them behind
            break
    together = _seconds(partial(streamed.step, x))
    assert together < max(computing, copies) + 0.5 * min(computing, copies), (
        f"computing {computing:.4f} s, copies {copies:.4f} s, together {together:.4f} s"
    )


def _seconds(action: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        action()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def test_memory_that_runs_out_in_mid_pass_leaves_the_next_pass_right():
    plain = Chain(Setting())
    x = plain.given(512)
    wanted = plain.step(x)
    for setting in SETTINGS:
        for failing in (1, 2):
            chain, visits = Chain(setting), 0

            def fail(*_: Any, failing: int = failing) -> None:
                nonlocal visits
                visits += 1
                if visits == failing:
                    raise torch.OutOfMemoryError("in mid-pass")

            hook = chain.model[3].mlp[1].register_forward_hook(fail)  # type: ignore[index, union-attr]
            for _ in range(2):
                try:
                    chain.step(x)
                except torch.OutOfMemoryError:
                    break
            hook.remove()
            same(chain.step(x), wanted)
            chain.placed.apply(Setting("all", streamed=0.8, offload=True))
            same(chain.step(x), wanted)
            chain.placed.close()


def test_pages_are_locked_shared_ones_too_and_can_be_locked_again(tmp_path: Path):
    for _ in range(2):
        for memory in (HostMemory(), HostMemory("weights", root=_in_memory(tmp_path))):
            held = memory.buffer("a", 3 * MIB + 5, lambda buffer: buffer.fill_(7))
            assert held.is_pinned()
            there = held.to(GPU, non_blocking=True)
            assert int(there.sum()) == 7 * held.numel()
            memory.free("a")
            memory.buffer("a", 3 * MIB + 5, lambda buffer: buffer.fill_(7))
            memory.close()


def test_pages_that_cuda_does_not_lock_are_copied_still(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HostMemory, "_lock_pages", lambda memory, key, held: False)
    plain, chain = Chain(Setting()), Chain(Setting(streamed=1.0))
    x = plain.given(64)
    wanted = plain.step(x)
    for _ in range(2):
        same(chain.step(x), wanted)


def _in_memory(otherwise: Path) -> Path:
    """A file system in memory where there is one: pages of a disk's files may not be locked."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else otherwise
