"""Settings that proved themselves on a card, for the next run of the same shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from raylora.base.errors import MissingObject
from raylora.base.storage import Storage
from raylora.memory.setting import Setting


@dataclass(frozen=True)
class Observed:
    """What a trial showed.

    Attributes:
        peak_bytes: device memory at most, with the optimizer's states.
        seconds_per_image: of a step.
    """

    peak_bytes: int
    seconds_per_image: float


class KnownSettings:
    """`plans/<name>.json` in the store, beside the runs: one object a card and job shape.

    Args:
        storage: the store's folder of them.
        shape: what the setting depends on, as plain data: the card's name, the job's need.
    """

    def __init__(self, storage: Storage, shape: Mapping[str, Any]) -> None:
        self._storage = storage
        self._shape = dict(shape)
        text = json.dumps(self._shape, sort_keys=True)
        self._key = f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def read(self) -> tuple[Setting, Observed] | None:
        """What was kept last; None where nothing was."""
        try:
            held = json.loads(self._storage.read(self._key))
        except MissingObject:
            return None
        return Setting.from_plain(held["setting"]), Observed(**held["observed"])

    def keep(self, setting: Setting, observed: Observed) -> None:
        """For the next run."""
        held = {"shape": self._shape, "setting": setting.plain(), "observed": asdict(observed)}
        self._storage.write(self._key, json.dumps(held, indent=1, sort_keys=True).encode())
