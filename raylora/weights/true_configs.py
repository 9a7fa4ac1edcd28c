"""The component configs of the usual bases, for checkpoints that bring none."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from importlib.resources import files
from typing import Any

Configs = dict[str, dict[str, Any]]


def true_configs(name: str) -> Configs:
    """Component -> config of a usual base, by its short name."""
    return deepcopy(_read(name))


@cache
def _read(name: str) -> Configs:
    found: Configs = json.loads((files(__package__) / "configs" / f"{name}.json").read_text())
    return found
