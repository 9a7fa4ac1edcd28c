"""What a run says of its memory, and what of it stays the same from one attempt to the next."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from children import together
from needs import card, flux_need
from safetensors import safe_open
from small import MakeJob, open_run

from raylora.assemble import make_run, open_store
from raylora.base.segments import SegmentWriter, read_segments
from raylora.base.storage import open_storage
from raylora.base.units import GIB
from raylora.check import check_job
from raylora.fit import _known_or_planned
from raylora.local import cache_here
from raylora.memory.bases import HeldLinear
from raylora.memory.budget import Budget
from raylora.memory.host import HostMemory
from raylora.memory.options import MemoryOptions
from raylora.memory.plan import Asked, make_plan
from raylora.memory.setting import Precision, Setting
from raylora.training.host_watch import MARGIN_BYTES, HostWatch
from raylora.training.known import KnownSettings, Observed
from raylora.training.loop import run_training
from raylora.training.memory import DeviceMemory
from raylora.training.reduce import Alone, Distributed, gather_plain
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


def test_a_run_that_ends_leaves_no_host_memory_behind(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "shared"
    root.mkdir()
    monkeypatch.setattr("raylora.fit.HostMemory", partial(HostMemory, root=root))
    job = make_job(memory__streaming=1.0)
    run = make_run(
        job,
        (checked := check_job(job)).family,
        cache_here(checked),
        open_store(job),
        Alone(),
        torch.device("cpu"),
        prove=False,
        report=False,
        share_host=True,
    )
    assert list(root.iterdir())
    run.close()
    assert not list(root.iterdir())


def test_what_was_known_is_left_where_another_phase_no_longer_fits(tmp_path: Path):
    asked = Asked(1, MemoryOptions(reserve_gib=0.0), "bf16", bnb=True)
    plan = make_plan(flux_need(), asked, [card(24)]).workers[0]
    rung = next(one for one in plan.rungs if one.setting != plan.chosen.setting)
    known = KnownSettings(open_storage(str(tmp_path)), {"card": "a test's"})
    known.keep(rung.setting, Observed(plan.budget_bytes, 0.25))
    fits = replace(rung, peaks={**rung.peaks, "preview": plan.budget_bytes}, host_bytes=0)
    grown = replace(rung, peaks={**rung.peaks, "preview": plan.budget_bytes + 1}, host_bytes=0)
    hosted = replace(fits, host_bytes=plan.host_budget_bytes + 1)
    found = [
        _known_or_planned(known, replace(plan, candidates=(), rungs=(one,)))
        for one in (fits, grown, hosted)
    ]
    assert found == [rung.setting, plan.chosen.setting, plan.chosen.setting]


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
