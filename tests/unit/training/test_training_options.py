"""Options of the trainer: what can be asked for together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from raylora.training.options import (
    LogOptions,
    TrainingOptions,
    ValidationOptions,
    held_out_problems,
)


def test_a_pace_is_given_once():
    with pytest.raises(ValidationError, match=r"save_every_steps and training\.save_every_epochs"):
        TrainingOptions(steps=1, save_every_steps=2, save_every_epochs=1)
    with pytest.raises(
        ValidationError, match=r"every_steps is 5 and validation\.every_epochs is 2"
    ):
        ValidationOptions(every_steps=5, every_epochs=2)


@pytest.mark.parametrize(
    ("given", "paces"),
    [
        ({}, (100, None)),
        ({"every_steps": None}, (100, None)),
        ({"every_steps": 7}, (7, None)),
        ({"every_epochs": 2}, (None, 2)),
    ],
)
def test_measuring_has_a_pace_and_keeps_it_through_a_file(given: Any, paces: Any):
    options = ValidationOptions(**given)
    assert (options.every_steps, options.every_epochs) == paces
    assert ValidationOptions(**options.model_dump()) == options


def test_no_pace_is_nought():
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        ValidationOptions(every_steps=0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"timesteps": (1, 2, 1)}, r"names \[1\] twice"),
        ({"min_delta": 0.1}, "without validation.patience"),
        ({"min_delta": 1.0, "patience": 1}, "less than 1"),
        ({"patience": 0}, "greater than or equal to 1"),
    ],
)
def test_validation_that_cannot_be_is_refused(given: Any, said: str):
    with pytest.raises(ValidationError, match=said):
        ValidationOptions(**given)


def test_what_compares_held_out_losses_needs_some():
    training = TrainingOptions(steps=1, keep_best=True)
    validation = ValidationOptions(patience=2, training_images=8)
    found = held_out_problems(training, validation, held_out=False, live=False)
    assert [problem.split(" ")[0] for problem in found] == [
        "training.keep_best",
        "validation.patience",
        "validation.training_images",
    ]
    assert held_out_problems(training, validation, held_out=True, live=False) == []
    (live,) = held_out_problems(training, validation, held_out=True, live=True)
    assert "has a fixed encoding" in live
    plain = held_out_problems(
        TrainingOptions(steps=1), ValidationOptions(), held_out=False, live=True
    )
    assert plain == []


def test_wandb_is_off_unless_asked_for():
    assert LogOptions().wandb is None
    assert LogOptions(wandb={}).wandb.mode == "online"  # type: ignore[arg-type, union-attr]
    with pytest.raises(ValidationError, match="api_key"):
        LogOptions(wandb={"api_key": "secret"})  # type: ignore[arg-type]
