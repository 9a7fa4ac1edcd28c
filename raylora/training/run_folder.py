"""A run's folder: who owns it, which attempt this is, whether it is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from raylora.base.errors import JobError
from raylora.base.storage import Storage

FREE_SECTIONS = ("store", "fleet", "memory", "log", "preview")
"""Sections that may change between two attempts: they never change what is trained."""


def claim_run(storage: Storage, job: Mapping[str, Any], *, name: str, extend: bool) -> None:
    """Take the run's name for this job, or find that it is this job's already.

    Args:
        job: the whole job as plain data.
        extend: the person asked to go on past the end of the finished run.

    Raises:
        JobError: another job has the name (the message says what differs), or the run would be
            made longer without being asked, or shorter.
    """
    text = yaml.safe_dump(dict(job), sort_keys=False)
    if storage.create("job.yaml", text.encode()):
        return
    held = yaml.safe_load(storage.read("job.yaml"))
    differing = [
        (path, old, new)
        for path, old, new in _differences(held, dict(job))
        if path.split(".")[0] not in FREE_SECTIONS
    ]
    if not differing:
        return
    longer = all(_is_longer(*difference) for difference in differing)
    if longer and extend:
        # First, so that a run stopped on its way to the new end does not pass for a finished one.
        storage.delete("result.json")
        storage.write("job.yaml", text.encode())
        return
    shown = "; ".join(f"{path} was {old!r}, is {new!r}" for path, old, new in differing[:5])
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    advice = (
        "To go on past its end, add --extend."
        if longer
        else "Choose another `name`, or undo the change to resume."
    )
    raise JobError(
        f"name: the run {name!r} in {storage.url} is another job: {shown}{more}. {advice}"
    )


def next_attempt(storage: Storage) -> int:
    """1 for a new run; one more than any attempt that wrote an event."""
    names = [entry.key.rsplit("/", 1)[-1] for entry in storage.entries("events")]
    return 1 + max((int(name.split("-")[0]) for name in names), default=0)


def finished_steps(storage: Storage) -> int | None:
    """At which step the run ended well; None while it has not."""
    if storage.entry("result.json") is None:
        return None
    return int(json.loads(storage.read("result.json"))["steps"])


def _is_longer(path: str, old: Any, new: Any) -> bool:
    """Whether it is the length that differs, and more of it is asked for than before."""
    if path not in ("training.steps", "training.epochs"):
        return False
    return old is None or new is None or bool(new > old)


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for word in [*old, *(w for w in new if w not in old)]:
            deeper = f"{path}.{word}" if path else str(word)
            found += _differences(old.get(word), new.get(word), deeper)
        return found
    return [] if old == new else [(path, old, new)]
