"""Curves of the rate against sd-scripts, transformers, diffusers, and their own ends."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raylora.base.errors import OptionError
from raylora.optim.schedules import WORDS, ScheduleOptions, make_schedule

CURVES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "lr_curves.json").read_text()
)


def options_of(curve: dict[str, Any]) -> ScheduleOptions:
    """sd-scripts' arguments as ours; what a schedule does not use is left out, as ours wants it."""
    given = {
        "warmup_steps": curve["lr_warmup_steps"],
        "decay_steps": curve["lr_decay_steps"],
        "cycles": curve["num_cycles"],
        "power": curve["power"],
        "min_ratio": curve["min_lr_ratio"],
    }
    used = {word: given[word] for word in WORDS[curve["name"]] if word in given}
    if curve["name"] == "piecewise_constant":
        (rules,) = curve["lr_scheduler_args"]
        used["step_rules"] = rules.removeprefix("step_rules='").removesuffix("'")
    return ScheduleOptions(name=curve["name"], **used)


@pytest.mark.parametrize("curve", CURVES, ids=lambda c: f"{c['name']}-{c['lr_warmup_steps']}")
def test_the_curve_is_that_of_sd_scripts(curve: dict[str, Any]):
    total = curve["max_train_steps"]
    factor = make_schedule(options_of(curve), total, 1.0)
    ours = [factor(t) for t in range(total + 1)]
    if "error" in curve:  # sd-scripts has no constant with warm-up: it is constant_with_warmup
        warmed = next(c for c in CURVES if c["name"] == "constant_with_warmup")
        curve = {**warmed, "lr_warmup_steps": curve["lr_warmup_steps"]}
    theirs = [*curve["lr_used_at_step"], curve["lr_after_last"]]
    assert ours == pytest.approx(theirs, abs=1e-9, rel=0)


READERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("constant_with_warmup", {}, {}),
    ("linear", {}, {}),
    ("cosine", {}, {}),
    ("cosine_with_restarts", {"cycles": 3}, {"num_cycles": 3}),
    ("polynomial", {"power": 2.5}, {"power": 2.5}),
    ("inverse_sqrt", {"timescale": 4}, {"timescale": 4}),
    ("cosine_with_min_lr", {"min_ratio": 0.2}, {"min_lr_rate": 0.2}),
    (
        "warmup_stable_decay",
        {"decay_steps": 6, "min_ratio": 0.2},
        {"num_decay_steps": 6, "min_lr_ratio": 0.2},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(("name", "ours", "theirs"), READERS, ids=[name for name, _, _ in READERS])
def test_the_curve_is_that_of_transformers(
    name: str, ours: dict[str, Any], theirs: dict[str, Any], warmup: int
):
    from transformers import optimization as them

    maker = them.TYPE_TO_SCHEDULER_FUNCTION[them.SchedulerType(name)]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    lengths = {"num_warmup_steps": warmup, "num_training_steps": 30}
    if name in ("constant_with_warmup", "inverse_sqrt"):
        del lengths["num_training_steps"]
    scheduler = maker(optimizer, **lengths, **theirs)
    factor = make_schedule(ScheduleOptions(name=name, warmup_steps=warmup, **ours), 30, 2e-3)
    for step in range(30):
        assert 2e-3 * factor(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("linear", {"warmup_steps": 3}, {"num_warmup_steps": 3, "num_training_steps": 30}),
        ("cosine", {"warmup_steps": 3}, {"num_warmup_steps": 3, "num_training_steps": 30}),
        ("polynomial", {"power": 2}, {"num_training_steps": 30, "num_warmup_steps": 0, "power": 2}),
        (
            "piecewise_constant",
            {"step_rules": "1:5,0.3:11,0.01"},
            {"step_rules": "1:5,0.3:11,0.01"},
        ),
    ],
)
def test_the_curve_is_that_of_diffusers(name: str, ours: dict[str, Any], theirs: dict[str, Any]):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    get_scheduler = importlib.import_module("diffusers.optimization").get_scheduler
    scheduler = get_scheduler(name, optimizer, **theirs)
    factor = make_schedule(ScheduleOptions(name=name, **ours), 30, 2e-3)
    for step in range(30):
        assert 2e-3 * factor(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


CLASSES = [
    ("torch.optim.lr_scheduler:ExponentialLR", {"gamma": 0.9}),
    ("CosineAnnealingLR", {"T_max": 12, "eta_min": 1e-4}),
    (
        "torch.optim.lr_scheduler.OneCycleLR",
        {"max_lr": 0.01, "total_steps": 20, "cycle_momentum": False},
    ),
]


@pytest.mark.parametrize(("name", "args"), CLASSES)
def test_a_class_is_followed_step_by_step_and_asked_in_any_order(name: str, args: dict[str, Any]):
    cls = getattr(torch.optim.lr_scheduler, name.replace(":", ".").rpartition(".")[2])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    scheduler = cls(optimizer, **args)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        if len(rates) < 20:
            scheduler.step()
    factor = make_schedule(ScheduleOptions(name=name, args=args), 20, 2e-3)
    assert [2e-3 * factor(t) for t in reversed(range(20))] == pytest.approx(rates[::-1], rel=1e-12)
    assert len(set(rates)) > 10


@given(
    name=st.sampled_from(["constant", "linear", "cosine", "cosine_with_restarts", "inverse_sqrt"]),
    warmup=st.integers(0, 40),
    total=st.integers(1, 200),
    step=st.integers(0, 199),
)
def test_the_factor_stays_between_nothing_and_the_peak(
    name: str, warmup: int, total: int, step: int
):
    factor = make_schedule(ScheduleOptions(name=name, warmup_steps=warmup), total)
    assert 0.0 <= factor(min(step, total - 1)) <= 1.0


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts"])
def test_the_fall_ends_at_nothing_one_step_after_the_last(name: str):
    factor = make_schedule(ScheduleOptions(name=name, warmup_steps=5), 50)
    assert factor(5) == 1.0
    assert 0.0 < factor(49) < factor(48)
    assert factor(50) == pytest.approx(0.0, abs=1e-15)


def test_shares_of_the_run_are_steps():
    share = ScheduleOptions(
        name="warmup_stable_decay", warmup_steps=0.1, decay_steps=0.25, min_ratio=0.5
    )
    steps = ScheduleOptions(
        name="warmup_stable_decay", warmup_steps=4, decay_steps=10, min_ratio=0.5
    )
    ours, same = make_schedule(share, 40), make_schedule(steps, 40)
    assert [ours(t) for t in range(41)] == [same(t) for t in range(41)]
    assert (ours(3), ours(4), ours(30), ours(35), ours(40)) == pytest.approx(
        (0.875, 1, 1, 0.75, 0.5)
    )


def test_a_schedule_read_from_its_own_dump_is_the_same():
    for name, words in [("linear", {"warmup_steps": 100}), ("linear", {"warmup_steps": 0.1})]:
        options = ScheduleOptions(name=name, **words)
        again = ScheduleOptions.model_validate_json(options.model_dump_json())
        assert again == options
        assert type(again.warmup_steps) is type(options.warmup_steps)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"name": "cosin"}, "Did you mean 'cosine'"),
        ({"name": "cosine", "cycles": 2}, "schedule.cycles is given, and cosine does not use it"),
        ({"name": "linear", "power": 2}, "choose polynomial"),
        ({"name": "linear", "min_ratio": 0.1}, "choose cosine_with_min_lr or warmup_stable_decay"),
        ({"name": "linear", "timescale": 3}, "choose inverse_sqrt"),
        ({"name": "linear", "args": {"gamma": 1}}, "choose module:Class"),
        ({"name": "linear", "step_rules": "1:2,3"}, "choose piecewise_constant"),
        ({"name": "adafactor", "warmup_steps": 3}, "adafactor does not use it"),
        (
            {"name": "piecewise_constant", "step_rules": "1:3,0.1", "warmup_steps": 3},
            "piecewise_constant does not use it",  # sd-scripts takes it and does nothing
        ),
        ({"name": "piecewise_constant"}, "step_rules is missing"),
        ({"name": "piecewise_constant", "step_rules": "1:20,0.1:10,0.01"}, "its steps must rise"),
        ({"name": "piecewise_constant", "step_rules": "1:a,2"}, "Write factor:step pairs"),
        ({"name": "cosine_with_min_lr"}, "min_ratio is missing"),
        ({"name": "warmup_stable_decay"}, "decay_steps is missing"),
        ({"warmup_steps": 7.5}, "neither whole steps nor a share"),
        ({"name": "torch.optim.lr_scheduler:StepLR", "args": {"gama": 1}}, "Did you mean 'gamma'"),
        ({"name": "torch.optim.lr_scheduler:StepLR"}, "step_size"),
        ({"name": "ReduceLROnPlateau"}, "asks for a loss on every step"),
        ({"name": "StepLR", "args": {"step_size": 2, "last_epoch": 3}}, "goes on by itself"),
        ({"name": "nowhere.at.all:StepLR"}, "cannot be imported"),
        ({"name": "torch.optim.lr_scheduler:StepRL"}, "Did you mean 'StepLR'"),
        ({"name": "torch.optim:SGD"}, "is not a kind of"),
        ({"name": "OneCycleLR", "args": {"max_lr": 1, "total_steps": 9}}, "momentum"),
        ({"name": "StepLR", "args": {"step_size": 2}, "warmup_steps": 3}, "does not use it"),
    ],
)
def test_what_cannot_work_is_refused(words: dict[str, Any], told: str):
    with pytest.raises(ValidationError, match=told):
        ScheduleOptions(**words)


def test_what_the_run_is_too_short_for_is_refused():
    options = ScheduleOptions(name="warmup_stable_decay", warmup_steps=5, decay_steps=6)
    with pytest.raises(OptionError, match="make 11 of the run's 10 steps"):
        make_schedule(options, 10)
    with pytest.raises(OptionError, match="polynomial, which falls to 1e-07"):
        make_schedule(ScheduleOptions(name="polynomial"), 10, 1e-7)
