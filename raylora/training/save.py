"""Saving: the LoRA file, its proof, and the checkpoint around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from raylora.adapt.keys import Naming
from raylora.adapt.layout import laid_out
from raylora.adapt.lora_file import AdapterModule, adapter_bytes
from raylora.adapt.onto import Names
from raylora.adapt.proof import ExportProver, ProofReport
from raylora.adapt.trained import trained
from raylora.base.log import get_logger
from raylora.base.storage import Storage
from raylora.training.checkpoint import State, prune, write_checkpoint
from raylora.training.first_look import FileAdapter, look_at
from raylora.training.parts import Parts
from raylora.training.run_folder import still_ours
from raylora.training.state import held_state

log = get_logger("step")


class Saver:
    """Writes checkpoints of a run; only worker 0 has one.

    Args:
        storage: the run's folder.
        dtype: of the numbers in the file.
        names: what files call the layers of the base.
        naming: whose names the file uses.
        metadata: step -> the file's header.
        prover: reads each file back independently; None where a caller measures speed alone.
        keep_last: checkpoints that stay; None keeps all.
        attempt: of this process; where a later one has taken the run, nothing is saved.
        adapter_of: reads the first file back as an adapter, which whole predictions are compared
            with; None looks at none.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        dtype: torch.dtype,
        metadata: Callable[[int], Mapping[str, str]],
        prover: ExportProver | None,
        keep_last: int | None,
        attempt: int,
        names: Names,
        naming: Naming = "kohya",
        adapter_of: FileAdapter | None = None,
    ) -> None:
        self._storage = storage
        self._dtype = dtype
        self._names = names
        self._naming = naming
        self._metadata = metadata
        self._prover = prover
        self._keep_last = keep_last
        self._attempt = attempt
        self._adapter_of = adapter_of

    def save(self, parts: Parts, step: int, facts: dict[str, Any]) -> ProofReport | None:
        """Write and prove the checkpoint of `step` steps.

        Raises:
            ExportError: the proof fails.
            TrainingError: a later attempt has taken the run.
        """
        with parts.shown():
            again = parts.fitting.again
            file = again(lambda: self.file(parts, step), f"the file of step {step}")
            report = None
            if self._prover:
                report = self._prover.prove(file, trained(parts.adapter), self._names)
            if self._adapter_of:
                look = again(
                    partial(look_at, parts, file, self._adapter_of, file_dtype=self._dtype),
                    "the look at the first file",
                )
                self._adapter_of = None
                if look:
                    log.info(
                        "first file: predicts as the adapter does, %.1e apart (rounding: up to "
                        "%.0e); it moves the base's prediction by %.2g %%",
                        *(look.difference, look.limit, 100 * look.effect),
                    )
                else:
                    log.warning("first file: the adapter's prediction is zero or not finite")
        tensors, held = held_state(parts)
        still_ours(self._storage, self._attempt)
        write_checkpoint(self._storage, State(step, tensors, {**facts, **held}), file)
        if self._keep_last is not None:
            prune(self._storage, self._keep_last)
        return report

    def file(self, parts: Parts, step: int) -> bytes:
        """The LoRA file as it would be saved now."""
        exported = parts.adapter.modules()
        modules = [AdapterModule(name, tensors) for name, tensors in exported.items()]
        return adapter_bytes(
            laid_out(modules, self._names, self._naming),
            dict(self._metadata(step)),
            dtype=self._dtype,
        )

    def close(self) -> None:
        """End the prover's process."""
        if self._prover:
            self._prover.close()
