"""Predicted peaks against what a GPU had allocated, bases of true size with random weights."""

from __future__ import annotations

import pytest
import torch
from programs import ROOT, load_program

from raylora.memory.setting import Setting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
MEMORY_GIB = 16


@pytest.mark.parametrize("model", ["sd15", "sdxl", "sd3"])
@pytest.mark.parametrize(
    "setting",
    [Setting(), Setting("alternate"), Setting("all"), Setting("all", streamed=0.9)],
    ids=["plain", "alternate", "all", "streamed"],
)
def test_what_is_allocated_is_what_was_predicted(
    model: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = load_program("benchmarks/gpu.py")
    device = torch.device("cuda", 0)
    if torch.cuda.mem_get_info(device)[0] < MEMORY_GIB * 2**30:
        pytest.skip(f"needs {MEMORY_GIB} GiB of free device memory")
    side = 512 if model == "sd15" else 1024
    case = gpu.Case(model, side, "full", setting)
    card = gpu.probe(device, options=gpu.job_of(case).memory)
    row = gpu.Bench(device).run(case, card)
    assert row["finite"]
    assert row["peak_gib"] == pytest.approx(row["predicted_peak_gib"], rel=0.1)
