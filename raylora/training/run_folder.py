"""A run's folder: who owns it, its precision, which attempt this is, whether it is finished."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

import yaml

from raylora.base.errors import JobError, MissingObject, TrainingError
from raylora.base.numbered import NumberedWriter, list_numbered
from raylora.base.storage import Storage
from raylora.memory.setting import Precision
from raylora.training.checkpoint import changed, read_newest

FREE = (
    *("store", "fleet", "memory", "log", "preview"),
    *("data.cache", "data.local_cache_gib", "data.max_bad"),
)
"""Sections and options that may change between two attempts: they never change what is trained, but
for memory.base and memory.states, of which a run keeps what it began with (`keep_precision`)."""
PLACES = frozenset(
    {
        *("family.weights", "validation.folder"),
        *(f"data.{word}" for word in ("folder", "manifest", "mask_folder")),
        *(f"data.sets.{word}" for word in ("folder", "manifest", "mask_folder")),
    }
)
"""Where things lie, without the numbers of sets. They may move when a person says so; what lies
there is compared by content."""
_ATTEMPTS = "attempts"
_PRECISION_KEY = "precision.json"


def claim_run(
    storage: Storage, job: Mapping[str, Any], *, name: str, extend: bool, moved: bool
) -> None:
    """Take the run's name for this job, or find that it is this job's already.

    Args:
        job: the whole job as plain data.
        extend: the person asked to go on past the end of the finished run.
        moved: the person said that images or base only lie elsewhere now.

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
        if not _is_free(path, old, new)
    ]
    differing += _other_precision(read_precision(storage), job)
    moves = [difference for difference in differing if _is_place(difference[0])]
    longer = bool(differing) and all(_is_longer(*difference) for difference in differing)
    if not differing or (moved and moves == differing):
        return
    if longer and extend:
        # First, so that a run stopped on its way to the new end does not pass for a finished one.
        storage.delete("result.json")
        storage.write("job.yaml", text.encode())
        return
    shown = "; ".join(f"{path} was {old!r}, is {new!r}" for path, old, new in differing[:5])
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    if longer:
        advice = "To go on past its end, add --extend."
    elif moves == differing:
        advice = (
            "If they only moved, add --moved: their content is compared. Otherwise choose another "
            "`name`."
        )
    else:
        advice = "Choose another `name`, or undo the change to resume."
    raise JobError(
        f"name: the run {name!r} in {storage.url} is another job: {shown}{more}. {advice}"
    )


def read_precision(storage: Storage) -> Precision | None:
    """What the run began with; None where it has not begun."""
    try:
        return Precision.from_plain(json.loads(storage.read(_PRECISION_KEY)))
    except MissingObject:
        return None


def keep_precision(storage: Storage, precision: Precision) -> None:
    """Write what the run begins with, for every later attempt on any fleet.

    Raises:
        TrainingError: another attempt began meanwhile, with another one.
    """
    text = json.dumps(precision.plain(), sort_keys=True)
    if storage.create(_PRECISION_KEY, text.encode()):
        return
    held = read_precision(storage)
    if held != precision:
        raise TrainingError(
            f"this run in {storage.url} was begun with {held}, and this attempt with {precision}. "
            "Start it again: it then takes the first."
        )


def settle_move(storage: Storage, job: Mapping[str, Any], content: Mapping[str, str]) -> None:
    """Write the job's new places into the run, once what lies there is what was trained on.

    Args:
        content: fingerprints of what lies there now, as the checkpoints' facts hold them.

    Raises:
        JobError: it is something else than the newest checkpoint was trained on.
    """
    held = yaml.safe_load(storage.read("job.yaml"))
    if not any(_is_place(path) for path, _, _ in _differences(held, dict(job))):
        return
    state = read_newest(storage)
    wrong = [word for word in content if state and state.facts[word] != content[word]]
    if state and wrong:
        raise JobError(f"--moved: {changed(wrong[0], state.step)} Choose another `name`.")
    storage.write("job.yaml", yaml.safe_dump(dict(job), sort_keys=False).encode())


def claim_attempt(storage: Storage) -> int:
    """Number this start of the run, 1 for the first; leaves who it is in `attempts/`.

    Whoever starts last has the run: the one before notices at its next save (`still_ours`).
    """
    who = {"host": socket.gethostname(), "process": os.getpid(), "began": round(time.time(), 3)}
    return 1 + NumberedWriter(storage, _ATTEMPTS, ".json").put(json.dumps(who).encode())


def still_ours(storage: Storage, attempt: int) -> None:
    """Refuse to go on where a later attempt has taken the run.

    Two that write one run's checkpoints could mix their files.

    Raises:
        TrainingError: names the other's host and process.
    """
    later = list_numbered(storage, _ATTEMPTS, after=attempt - 1)
    if not later:
        return
    who = json.loads(storage.read(later[-1][1]))
    raise TrainingError(
        f"this run in {storage.url} was started again by process {who['process']} on "
        f"{who['host']}, which has it now; this one (attempt {attempt}) saves no more. Stop one of "
        "two that are meant to be one, or give them two names."
    )


def finished_steps(storage: Storage) -> int | None:
    """At which step the run ended well; None while it has not."""
    if storage.entry("result.json") is None:
        return None
    return int(json.loads(storage.read("result.json"))["steps"])


def _is_free(path: str, old: Any, new: Any) -> bool:
    """Whether an option may change between two attempts."""
    if path == "data.cache" and "none" in (old, new):
        return False  # what is not cached is drawn anew at each step
    return path in FREE or path.startswith(tuple(f"{word}." for word in FREE))


def _other_precision(kept: Precision | None, job: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where the job asks for another precision than the run has; `auto` asks for none."""
    if kept is None:
        return []
    asked = job["memory"]
    return [
        (f"memory.{word}", held, asked[word])
        for word, held in (("base", kept.base), ("states", kept.states))
        if asked.get(word, "auto") not in ("auto", held)
    ]


def _is_place(path: str) -> bool:
    return re.sub(r"\.\d+", "", path) in PLACES


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
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [one for i, pair in pairs for one in _differences(*pair, f"{path}.{i}")]
    return [] if old == new else [(path, old, new)]
