"""The held-out loss: the same images, timesteps and noise every time, over all workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from raylora.base.seeds import draw_generator, draw_normal, shuffled_order
from raylora.data.dataset import Dataset
from raylora.data.rows import Row
from raylora.data.steps import SampleRef
from raylora.data.supply import Tensors, measured_tensors
from raylora.training.loader import micro_batches
from raylora.training.parts import Parts
from raylora.training.step import losses_at

# Not the job's seed: trials of a sweep with different seeds are measured with one ruler.
NOISE_SEED = 0

Measured = Callable[[Dataset, Sequence[Row]], list[Tensors]]
"""The tensors of rows as they are measured, with nothing about them drawn."""


class Validation:
    """Measures the loss on held-out images and, where asked, on some that are trained on.

    Args:
        dataset: the held-out rows.
        timesteps: each image is measured at each of these.
        training: what is trained on, for the second ruler; None is none.
        training_images: how many of its rows are measured, at most; regularisation images are not.
        measured: gives rows their tensors.
    """

    def __init__(
        self,
        dataset: Dataset,
        timesteps: tuple[int, ...],
        *,
        training: Dataset | None = None,
        training_images: int = 0,
        measured: Measured = measured_tensors,
    ) -> None:
        self.dataset = dataset
        dataset.fill()
        self.timesteps = timesteps
        self._measured = measured
        chosen = draw_measured(training, training_images) if training else []
        self._training = (training, chosen) if training and chosen else None

    @torch.no_grad()
    def measure(self, parts: Parts) -> dict[str, float]:
        """Means over images, the same on every worker.

        Returns:
            {"validation": mean, "validation/<t>": mean at that timestep}, and the same with
            "training" where images that are trained on are measured.
        """
        numbers = self._means(parts, self.dataset, list(self.dataset.rows), "validation")
        if self._training:
            numbers |= self._means(parts, *self._training, "training")
        return numbers

    def _means(
        self, parts: Parts, dataset: Dataset, rows: Sequence[Row], name: str
    ) -> dict[str, float]:
        mine = [
            SampleRef(row=i, repeat=0, number=rows[i].number, bucket=rows[i].bucket)
            for i in range(parts.group.rank, len(rows), parts.group.size)
        ]
        mine.sort(key=lambda sample: sample.bucket)
        tensors = self._measured(dataset, [rows[sample.row] for sample in mine])
        gathered = parts.group.gather(self._sums(parts, mine, tensors))
        means = [sum(column) / len(rows) for column in zip(*gathered, strict=True)]
        bands = {f"{name}/{t}": m for t, m in zip(self.timesteps, means, strict=True)}
        return {name: sum(means) / len(means), **bands}

    def _sums(
        self, parts: Parts, mine: Sequence[SampleRef], tensors: Sequence[Tensors]
    ) -> list[float]:
        """Sum of this worker's losses at each timestep; out of memory begins again with less."""

        def summed() -> list[float]:
            sums = [0.0] * len(self.timesteps)
            for mates, batch in micro_batches(mine, tensors, parts.micro_batch):
                for i, timestep in enumerate(self.timesteps):
                    sums[i] += _loss_sum(parts, mates, batch, timestep)
            return sums

        return parts.fitting.again(summed, "the held-out loss")


def draw_measured(dataset: Dataset, count: int) -> list[Row]:
    """Rows of what is trained on that are measured beside the held-out ones, always the same.

    Regularisation images are left out: what they should look like is the base's.
    """
    rows, sets = dataset.rows, dataset.facts.sets
    ours = np.flatnonzero([not sets[number].is_reg for number in rows.set.tolist()])
    order = shuffled_order(draw_generator(NOISE_SEED, 0, 0, "ruler"), len(ours))
    return [rows[int(ours[at])] for at in sorted(order[:count])]


def _loss_sum(
    parts: Parts, mates: Sequence[SampleRef], batch: dict[str, Tensor], timestep: int
) -> float:
    shape = tuple(batch["latents"].shape[1:])
    drawn = [
        draw_normal(shape, seed=NOISE_SEED, step=timestep, sample=mate.number, purpose="validation")
        for mate in mates
    ]
    timesteps = torch.full((len(mates),), timestep, dtype=parts.timesteps.dtype)
    return float(losses_at(parts, batch, torch.from_numpy(np.stack(drawn)), timesteps).sum())
