"""What a store has to show: runs, their complete checkpoints, and the adapters in them."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import yaml

from raylora.adapt.attach import Adapter
from raylora.adapt.from_file import adapter_on
from raylora.adapt.onto import Names
from raylora.base.errors import MissingObject, WeightsError
from raylora.base.site import Site
from raylora.base.storage import Storage, is_key
from raylora.training.checkpoint import checkpoint_steps

V = TypeVar("V")


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint's adapter.

    Attributes:
        hash: sha256 of the LoRA file, by which a picture says what drew it.
    """

    run: str
    step: int
    hash: str

    @property
    def name(self) -> str:
        """The word for it in a request."""
        return f"{self.run}/{self.step}"


class Library:
    """Runs and checkpoints below `<store>/runs`; reads the store anew at every call.

    A run that trains meanwhile shows each checkpoint as soon as its manifest is there.
    """

    def __init__(self, store: Storage) -> None:
        self._store = store

    def runs(self) -> list[str]:
        """Names of all runs, with or without a checkpoint yet."""
        keys = [entry.key.split("/") for entry in self._store.entries("runs")]
        return sorted(key[1] for key in keys if len(key) == 3 and key[2] == "job.yaml")

    def job(self, run: str) -> dict[str, Any]:
        """The run's job as plain data; MissingObject when there is no such run."""
        tree: dict[str, Any] = yaml.safe_load(self._store.read(f"runs/{run}/job.yaml"))
        return tree

    def checkpoints(self, run: str) -> list[Checkpoint]:
        """The run's complete checkpoints, rising."""
        steps = checkpoint_steps(self._store.within(f"runs/{run}"))
        return [self._checkpoint(run, step) for step in steps]

    def find(self, adapter: str) -> Checkpoint:
        """The checkpoint that "<run>" (its newest) or "<run>/<step>" names.

        Raises:
            MissingObject: there is none; the message names near ones.
        """
        run, slash, step = adapter.partition("/")
        if not is_key(run) or self._store.entry(f"runs/{run}/job.yaml") is None:
            raise MissingObject(f"adapter {adapter!r}: no such run.{_near(run, self.runs())}")
        steps = checkpoint_steps(self._store.within(f"runs/{run}"))
        if not steps:
            raise MissingObject(f"adapter {adapter!r}: the run has no checkpoint yet.")
        if not slash:
            return self._checkpoint(run, steps[-1])
        if step.isascii() and step.isdigit() and int(step) in steps:
            return self._checkpoint(run, int(step))
        names = [f"{run}/{held}" for held in steps]
        raise MissingObject(
            f"adapter {adapter!r}: the run has no such checkpoint.{_near(adapter, names)}"
        )

    def load(
        self,
        checkpoint: Checkpoint,
        sites: Sequence[Site],
        names: Names,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Adapter:
        """The checkpoint's adapter on these sites; see `adapter_on`.

        Raises:
            MissingObject: it was pruned since it was found.
            WeightsError: the file is not the one that the manifest names, or does not fit.
        """
        data = self._store.read(f"{_folder(checkpoint.run, checkpoint.step)}/adapter.safetensors")
        if hashlib.sha256(data).hexdigest() != checkpoint.hash:
            raise WeightsError(
                f"{checkpoint.name}: adapter.safetensors is not what its manifest says, so it was "
                "changed after it was saved. Draw another checkpoint."
            )
        return adapter_on(sites, names, data, dtype=dtype, device=device)

    def _checkpoint(self, run: str, step: int) -> Checkpoint:
        manifest = json.loads(self._store.read(f"{_folder(run, step)}/manifest.json"))
        return Checkpoint(run, step, manifest["objects"]["adapter.safetensors"]["sha256"])


class Recent(Generic[V]):
    """The `limit` values that were asked for last, by a key that names their content."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[str, V] = OrderedDict()

    def get(self, key: str, make: Callable[[], V]) -> V:
        """The value of that key, made when it is not held.

        The one unused longest leaves first, so that never more than `limit` are in memory.
        """
        if key not in self._held:
            while len(self._held) >= self._limit:
                self._held.popitem(last=False)
            self._held[key] = make()
        self._held.move_to_end(key)
        return self._held[key]


def _folder(run: str, step: int) -> str:
    return f"runs/{run}/checkpoints/{step:06d}"


def _near(word: str, names: Sequence[str]) -> str:
    """A sentence with up to three names like the word, or else a few of all."""
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        return f" Near: {', '.join(near)}."
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" There are: {', '.join(names[:3])}{more}." if names else " The store has none."
