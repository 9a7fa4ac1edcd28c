"""A cluster of one's own is not started where it could never train."""

from __future__ import annotations

import pytest
import torch

from raylora.base.errors import UserError
from raylora.fleet import FleetOptions
from raylora.on_ray.resources import connect


def test_a_fleet_of_gpus_on_a_machine_without_one_is_refused(monkeypatch: pytest.MonkeyPatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"no GPU.*fleet\.cpus_only: true.*--local"):
        connect(FleetOptions())
