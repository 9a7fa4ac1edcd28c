"""What a run says of its memory, and what of it stays the same from one attempt to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from children import together
from safetensors import safe_open
from small import MakeJob, open_run

from raylora.base.segments import SegmentWriter, read_segments
from raylora.base.storage import open_storage
from raylora.base.units import GIB
from raylora.memory.bases import HeldLinear
from raylora.memory.budget import Budget
from raylora.memory.setting import Precision, Setting
from raylora.training.host_watch import MARGIN_BYTES, HostWatch
from raylora.training.known import KnownSettings, Observed
from raylora.training.loop import run_training
from raylora.training.memory import DeviceMemory
from raylora.training.reduce import Distributed, gather_plain
from raylora.training.report import worker_teller
from raylora.training.run_folder import read_precision


@pytest.mark.slow
def test_a_resumed_run_keeps_its_precision_and_its_file_says_it(make_job: MakeJob):
    first = open_run(make_job(memory__base="int8", training__steps=2), report=True)
    run_training(first)
    first.close()
    assert read_precision(first.storage) == Precision(base="int8")
    again = open_run(make_job(training__steps=2), report=True)
    held = [m for m in again.parts.denoiser.modules() if isinstance(m, HeldLinear)]
    again.close()
    assert held
    path = Path(first.storage.url.removeprefix("file://")) / "checkpoints/000002"
    with safe_open(path / "adapter.safetensors", framework="pt") as file:
        assert file.metadata()["raylora.base_precision"] == "int8"


def test_a_run_that_asks_for_nothing_has_nothing_around_its_models(make_job: MakeJob):
    run = open_run(make_job())
    assert not run.parts.fitting.limited
    assert run.trial is None
    blocks = run.parts.denoiser.down_blocks
    assert "forward" not in vars(blocks[0].resnets[0])  # only layers with an adapter have their own
    run.close()


def test_a_budget_counts_what_is_made_within_it_and_refuses_more():
    budget = Budget(2**20)
    layer = torch.nn.Linear(64, 64)
    budget.watch([layer], [torch.zeros(1024)])
    budget.apply(Setting())
    held = 64 * 64 * 4 + 512 + 4096  # the bias is rounded up
    memory = DeviceMemory(torch.device("cpu"), budget=budget)
    with memory.limited():
        made = torch.ones(2**17)
        assert memory.numbers()["memory_bytes"] == held + made.nbytes
        del made
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(2**18)
        with budget.passed_over():
            torch.ones(2**18)
    assert memory.numbers() == {
        "memory_bytes": held,
        "peak_bytes": held + 2**19,
        "total_bytes": 2**20,
    }
    memory.forget_peak()
    assert memory.peak_bytes == held


def test_a_host_that_runs_full_is_told_once():
    free = iter([MARGIN_BYTES, MARGIN_BYTES - 1, 0])
    told: list[dict[str, Any]] = []
    watch = HostWatch(lambda: next(free))
    for step in range(4):
        watch.look(step, lambda kind, **facts: told.append({"kind": kind, **facts}))
    (event,) = told
    assert (event["kind"], event["step"]) == ("host memory", 1)
    assert "1.00 GiB of memory left" in event["warning"]


def test_a_setting_is_known_by_the_whole_shape(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    shape = {"card": "CPU", "bucket": [64, 64]}
    known = KnownSettings(storage, shape)
    assert known.read() is None
    setting, observed = Setting("alternate", streamed=0.4), Observed(GIB, 0.25)
    known.keep(setting, observed)
    known.keep(setting, observed)
    assert KnownSettings(storage, dict(reversed(shape.items()))).read() == (setting, observed)
    assert KnownSettings(storage, {**shape, "bucket": [64, 128]}).read() is None


def test_a_worker_without_a_reporter_writes_beside_worker_0(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    first = SegmentWriter(storage, "events", attempt=2, every_seconds=0.0)
    tell = worker_teller(storage, attempt=2, rank=1)
    first.add({"event": "started"})
    tell("out of memory", at="step 1")
    tell("plan", card="CPU")
    rows = read_segments(storage, "events")
    assert {row["event"] for row in rows} == {"started", "out of memory", "plan"}
    assert [row["worker"] for row in rows if "worker" in row] == [1, 1]
    assert {row["attempt"] for row in rows} == {2}


def gathered(rank: int) -> list[Any]:
    return gather_plain(Distributed(), {"name": "é" * (1 + 5 * rank), "bytes": 2**60 + rank})


@pytest.mark.slow
def test_workers_tell_each_other_plain_data_of_any_length():
    wanted = [{"name": "é", "bytes": 2**60}, {"name": "é" * 6, "bytes": 2**60 + 1}]
    assert together(2, gathered) == [wanted, wanted]
