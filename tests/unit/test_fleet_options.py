"""Workers and shares: what may be written, and how many workers it means."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from raylora.fleet import FleetOptions, WorkerKind


def test_workers_are_a_number_or_kinds():
    assert FleetOptions().count == 1
    assert FleetOptions(workers=3).count == 3
    mixed = FleetOptions(workers=(WorkerKind(gpu="L4", count=2), WorkerKind(gpu="A100")))
    assert mixed.count == 3


def test_shares_are_measured_or_one_number_for_each_worker():
    assert FleetOptions(workers=2).shares == "measured"
    assert FleetOptions(workers=2, shares=(3, 0)).shares == (3.0, 0.0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"workers": 0}, "fleet.workers must be at least 1"),
        ({"workers": ()}, "fleet.workers must be at least 1"),
        ({"workers": 2, "shares": (1.0,)}, "fleet.shares has 1 numbers for 2 workers"),
        ({"workers": 2, "shares": (1.0, -1.0)}, "fleet.shares must be 0 or more, and not all 0"),
        ({"workers": 2, "shares": (0.0, 0.0)}, "fleet.shares must be 0 or more, and not all 0"),
        ({"workers": 2, "shares": (1.0, float("inf"))}, "finite number"),
        ({"cpus_per_worker": 0}, "greater than 0"),
        ({"refit_every_steps": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_a_fleet_is_refused(given: dict[str, Any], sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        FleetOptions(**given)
