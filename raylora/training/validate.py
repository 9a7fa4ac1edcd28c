"""The held-out loss: the same images, timesteps and noise every time, over all workers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raylora.base.seeds import draw_normal
from raylora.data.dataset import Dataset
from raylora.data.steps import SampleRef
from raylora.data.supply import Tensors, measured_tensors
from raylora.training.loader import micro_batches
from raylora.training.parts import Parts
from raylora.training.step import losses_at

# Not the job's seed: trials of a sweep with different seeds are measured with one ruler.
NOISE_SEED = 0


class Validation:
    """Measures the loss on held-out images.

    Args:
        dataset: the held-out rows.
        timesteps: each image is measured at each of these.
    """

    def __init__(self, dataset: Dataset, timesteps: tuple[int, ...]) -> None:
        self.dataset = dataset
        dataset.fill()
        self.timesteps = timesteps

    @torch.no_grad()
    def measure(self, parts: Parts) -> dict[str, float]:
        """{"validation": mean, "validation/<t>": mean at that timestep}; same on every worker."""
        rows = self.dataset.rows
        mine = [
            SampleRef(row=i, repeat=0, number=rows[i].number, bucket=rows[i].bucket)
            for i in range(parts.group.rank, len(rows), parts.group.size)
        ]
        mine.sort(key=lambda sample: sample.bucket)
        tensors = measured_tensors(self.dataset, [rows[sample.row] for sample in mine])
        sums = self._sums(parts, mine, tensors)
        gathered = parts.group.gather(sums)
        means = [sum(column) / len(rows) for column in zip(*gathered, strict=True)]
        measured = {f"validation/{t}": m for t, m in zip(self.timesteps, means, strict=True)}
        return {"validation": sum(means) / len(means), **measured}

    def _sums(
        self, parts: Parts, mine: Sequence[SampleRef], tensors: Sequence[Tensors]
    ) -> list[float]:
        """Sum of this worker's losses at each timestep; out of memory halves the micro-batch."""
        while True:
            sums = [0.0] * len(self.timesteps)
            try:
                for mates, batch in micro_batches(mine, tensors, parts.micro_batch):
                    for i, timestep in enumerate(self.timesteps):
                        sums[i] += _loss_sum(parts, mates, batch, timestep)
                return sums
            except torch.OutOfMemoryError:
                if parts.micro_batch == 1:
                    raise
            parts.halve_micro_batch("validation")


def _loss_sum(
    parts: Parts, mates: Sequence[SampleRef], batch: dict[str, Tensor], timestep: int
) -> float:
    shape = tuple(batch["latents"].shape[1:])
    drawn = [
        draw_normal(shape, seed=NOISE_SEED, step=timestep, sample=mate.number, purpose="validation")
        for mate in mates
    ]
    timesteps = torch.full((len(mates),), timestep, dtype=torch.int64)
    return float(losses_at(parts, batch, torch.from_numpy(np.stack(drawn)), timesteps).sum())
