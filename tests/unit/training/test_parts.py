"""What a worker trains with: rates and estimates by group, and when the text encoder stops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from raylora.optim.groups import Group
from raylora.training.parts import Mover


def mover(*held: dict[str, float], **more: Any) -> Mover:
    """Over groups of an optimizer that hold these."""
    names = ["textencoder", "unet"][-len(held) :]
    groups = [Group(name, "denoiser", 1.0, 1, ()) for name in names]
    optimizer: Any = SimpleNamespace(param_groups=list(held))
    given: dict[str, Any] = {"rates": None, "max_grad_norm": 0.0, **more}
    return Mover(optimizer=optimizer, groups=groups, **given)


def test_what_an_optimizer_found_is_told_by_group_where_there_are_several():
    assert mover({"lr": 1.0, "d": 0.5}).estimates() == {"d": 0.5}
    two = mover({"lr": 1.0, "d": 0.5}, {"lr": 1.0, "d": 0.25})
    assert two.estimates() == {"d/textencoder": 0.5, "d/unet": 0.25}
    assert mover({"lr": 1.0}).estimates() == {}


def test_rates_are_the_schedules_or_what_the_optimizer_holds():
    held = ({"lr": 0.5}, {})
    assert mover(*held).rates_now(3) == {"textencoder": 0.5, "unet": 0.0}
    scheduled = mover(*held, rates=lambda step: [step * 1.0, step * 2.0])
    assert scheduled.rates_now(3) == {"textencoder": 3.0, "unet": 6.0}


def test_the_text_encoder_stops_at_its_step_and_not_before():
    stops = mover({"lr": 1.0}, text_stops=4)
    assert [stops.stopped(step) for step in range(6)] == [False] * 4 + [True] * 2
    assert not mover({"lr": 1.0}).stopped(9)
