"""Saving: the LoRA file, its proof, and the checkpoint around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from raylora.adapt.deltas import LowRank
from raylora.adapt.lora_file import AdapterModule, adapter_bytes
from raylora.adapt.proof import ExportProver, ProofReport
from raylora.base.storage import Storage
from raylora.networks import NetworkOptions
from raylora.training.checkpoint import State, optimizer_tensors, prune, write_checkpoint
from raylora.training.parts import Parts
from raylora.training.run_folder import still_ours


class Saver:
    """Writes checkpoints of a run; only worker 0 has one.

    Args:
        storage: the run's folder.
        network: options of the network, for the file's alpha.
        dtype: of the numbers in the file.
        metadata: step -> the file's header.
        prover: reads each file back independently; None where a caller measures speed alone.
        keep_last: checkpoints that stay; None keeps all.
        attempt: of this process; where a later one has taken the run, nothing is saved.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        network: NetworkOptions,
        dtype: torch.dtype,
        metadata: Callable[[int], Mapping[str, str]],
        prover: ExportProver | None,
        keep_last: int | None,
        attempt: int,
    ) -> None:
        self._storage = storage
        self._network = network
        self._dtype = dtype
        self._metadata = metadata
        self._prover = prover
        self._keep_last = keep_last
        self._attempt = attempt

    def save(self, parts: Parts, step: int, facts: dict[str, Any]) -> ProofReport | None:
        """Write and prove the checkpoint of `step` steps.

        Raises:
            ExportError: the proof fails.
            TrainingError: a later attempt has taken the run.
        """
        file = self.file(parts, step)
        report = self._prover.prove(file, self._expected(parts)) if self._prover else None
        tensors = {"values": parts.adapter.values.detach(), **optimizer_tensors(parts.optimizer)}
        still_ours(self._storage, self._attempt)
        write_checkpoint(self._storage, State(step, tensors, facts), file)
        if self._keep_last is not None:
            prune(self._storage, self._keep_last)
        return report

    def file(self, parts: Parts, step: int) -> bytes:
        """The LoRA file as it would be saved now."""
        exported = parts.adapter.modules()
        modules = [AdapterModule(name, tensors) for name, tensors in exported.items()]
        return adapter_bytes(modules, dict(self._metadata(step)), dtype=self._dtype)

    def close(self) -> None:
        """End the prover's process."""
        if self._prover:
            self._prover.close()

    def _expected(self, parts: Parts) -> dict[str, LowRank]:
        """What was trained, from the adapter's own numbers and not from the file's making."""
        adapter, expected = parts.adapter, {}
        for site in adapter.sites:
            held = adapter.parameters[site.name]
            shape = (..., None, None) if site.kind == "conv" else (...,)
            down, up = (held[word].detach().cpu().clone()[shape] for word in ("down", "up"))
            expected[site.name] = (down, up, adapter.scales[site.name])
        return expected
