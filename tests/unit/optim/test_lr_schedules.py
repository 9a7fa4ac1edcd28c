"""Curves of the rate against sd-scripts, transformers, and their own ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylora.optim.schedules import ScheduleOptions, make_schedule

CURVES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "lr_curves.json").read_text()
)
NAMES = ["constant", "linear", "cosine"]


@pytest.mark.parametrize("curve", CURVES, ids=lambda c: f"{c['name']}-{c['lr_warmup_steps']}")
def test_the_curve_is_that_of_sd_scripts(curve: dict[str, Any]):
    total, warmup = curve["max_train_steps"], curve["lr_warmup_steps"]
    steps = int(warmup * total) if warmup < 1 else warmup
    name = curve["name"].removesuffix("_with_warmup")
    factor = make_schedule(ScheduleOptions(name=name, warmup_steps=steps), total)
    assert [factor(t) for t in range(total)] == pytest.approx(curve["lr_used_at_step"], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["transformers", "diffusers.optimization"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_the_curve_is_that_of_other_trainers(name: Any, warmup: int, library: str):
    import importlib

    theirs = name if name != "constant" else "constant_with_warmup"
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = importlib.import_module(library).get_scheduler(
        theirs, optimizer, num_warmup_steps=warmup, num_training_steps=30
    )
    factor = make_schedule(ScheduleOptions(name=name, warmup_steps=warmup), 30)
    for step in range(30):
        assert factor(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@given(
    name=st.sampled_from(NAMES),
    warmup=st.integers(0, 40),
    total=st.integers(1, 200),
    step=st.integers(0, 199),
)
def test_the_factor_stays_between_nothing_and_the_peak(
    name: Any, warmup: int, total: int, step: int
):
    factor = make_schedule(ScheduleOptions(name=name, warmup_steps=warmup), total)
    assert 0.0 <= factor(min(step, total - 1)) <= 1.0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_fall_ends_at_nothing_one_step_after_the_last(name: Any):
    factor = make_schedule(ScheduleOptions(name=name, warmup_steps=5), 50)
    assert factor(5) == 1.0
    assert 0.0 < factor(49) < factor(48)
    assert factor(50) == pytest.approx(0.0, abs=1e-15)
