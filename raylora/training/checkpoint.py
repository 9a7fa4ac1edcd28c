"""Checkpoints in storage: whole or not at all.

    checkpoints/<step>/adapter.safetensors   the LoRA file
    checkpoints/<step>/state.safetensors     flat values and optimizer state, exact
    checkpoints/<step>/state.json            step, fingerprints of data and base, shares
    checkpoints/<step>/manifest.json         sizes and hashes; put last, and only once

A checkpoint without a manifest does not exist. Its objects may be written again by the next try.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from raylora.base.errors import MissingObject, TrainingError
from raylora.base.log import get_logger
from raylora.base.storage import Storage

log = get_logger("save")

FORMAT = 2
"""Of `state.json` and what is beside it; raised when an older raylora could not go on from it."""
CONTENT = {
    "dataset": "the images or captions are not those",
    "held_out": "the held-out images or captions are not those",
    "base": "the base's weights are not those",
}
"""Facts that name what a run is trained on, and how to say that one differs."""


def changed(word: str, step: int) -> str:
    """The sentence for a fact of `CONTENT` that differs from a checkpoint's."""
    return f"{CONTENT[word]} that this run was trained on up to step {step}."


@dataclass(frozen=True)
class State:
    """All that training needs to go on as if it had never stopped.

    Attributes:
        step: global steps done.
        tensors: `values`, their average as `ema`, what is not trained as `constants`, the
            optimizer's as `optimizer/<name>`.
        facts: what is not a tensor: fingerprints of `CONTENT`, the shares, whether the step was
            looked at, the optimizer's numbers.
    """

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def write_checkpoint(storage: Storage, state: State, adapter_file: bytes) -> None:
    """Store a checkpoint; one that is complete already is left as it is."""
    folder = _folder(state.step)
    objects = {
        "adapter.safetensors": adapter_file,
        "state.safetensors": save_tensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        ),
        "state.json": json.dumps(
            {"format": FORMAT, "step": state.step, **state.facts}, sort_keys=True
        ).encode(),
    }
    if storage.entry(f"{folder}/manifest.json") is not None:
        return
    for name, data in objects.items():
        storage.write(f"{folder}/{name}", data)
    manifest = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in objects.items()
    }
    text = json.dumps({"step": state.step, "objects": manifest}, indent=1, sort_keys=True)
    storage.create(f"{folder}/manifest.json", text.encode())


def checkpoint_steps(storage: Storage) -> list[int]:
    """Steps of the complete checkpoints, rising."""
    keys = [entry.key for entry in storage.entries("checkpoints")]
    return sorted(int(key.split("/")[1]) for key in keys if key.endswith("/manifest.json"))


def read_newest(storage: Storage) -> State | None:
    """The newest checkpoint whose objects are all as its manifest says; None when there is none.

    One that was damaged afterwards is reported and passed over.
    """
    for step in reversed(checkpoint_steps(storage)):
        try:
            return read_checkpoint(storage, step)
        except (MissingObject, ValueError) as error:
            log.warning("checkpoint %d is damaged (%s); trying the one before", step, error)
    return None


def read_checkpoint(storage: Storage, step: int) -> State:
    """The checkpoint of a step.

    Raises:
        MissingObject: it is not there.
        ValueError: an object is not what the manifest says.
        TrainingError: a newer raylora wrote it.
    """
    folder = _folder(step)
    manifest = json.loads(storage.read(f"{folder}/manifest.json"))
    objects = {}
    for name in ("state.safetensors", "state.json"):
        data = storage.read(f"{folder}/{name}")
        if hashlib.sha256(data).hexdigest() != manifest["objects"][name]["sha256"]:
            raise ValueError(f"{folder}/{name} does not match its manifest")
        objects[name] = data
    facts = json.loads(objects["state.json"])
    if (written := facts.pop("format")) != FORMAT:
        age = "a newer" if written > FORMAT else "an older"
        raise TrainingError(
            f"{storage.url}/{folder} was written by {age} raylora. Install that one to go on "
            "from it, or choose another `name`."
        )
    return State(int(facts.pop("step")), load_tensors(objects["state.safetensors"]), facts)


def read_facts(storage: Storage, step: int) -> dict[str, Any]:
    """What a checkpoint says of its run, without its tensors."""
    facts: dict[str, Any] = json.loads(storage.read(f"{_folder(step)}/state.json"))
    return facts


def prune(storage: Storage, keep_last: int) -> None:
    """Delete all but the newest checkpoints and those that the newest names in `keep`.

    The manifest goes first, so none is ever half there.
    """
    steps = checkpoint_steps(storage)
    if len(steps) <= keep_last:
        return
    spared = read_facts(storage, steps[-1]).get("keep", ())
    for step in steps[:-keep_last]:
        if step in spared:
            continue
        folder = _folder(step)
        storage.delete(f"{folder}/manifest.json")
        for entry in storage.entries(folder):
            storage.delete(entry.key)


def _folder(step: int) -> str:
    return f"checkpoints/{step:06d}"
