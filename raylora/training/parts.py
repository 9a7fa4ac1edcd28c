"""What a worker trains with; put together once, by `assemble.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raylora.adapt.attach import Adapter, Attachment
from raylora.base.log import get_logger
from raylora.diffusion.losses import SampleLoss
from raylora.diffusion.process import Process
from raylora.training.loader import Loader
from raylora.training.reduce import Group
from raylora.training.shares import Shares
from raylora.training.sums import Sums

log = get_logger("train")

Predict = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]


@dataclass
class Parts:
    """A worker's share of a run.

    Attributes:
        denoiser: frozen, with the adapter attached.
        predict: the family's prediction.
        loss: (prediction, target, timesteps, weighing) -> (B,).
        factor: global step -> factor on the learning rate.
        loader: the samples of each step, and their cached tensors.
        sums: how gradients and losses are added up.
        micro_batch: images at once; out of memory halves it.
        dtype: of activations; losses and the adapter are in `adapter.values.dtype`.
        timesteps: range [low, high) that is drawn from.
    """

    denoiser: nn.Module
    attachment: Attachment
    adapter: Adapter
    predict: Predict
    process: Process
    loss: SampleLoss
    optimizer: torch.optim.Optimizer
    factor: Callable[[int], float]
    learning_rate: float
    max_grad_norm: float
    loader: Loader
    group: Group
    shares: Shares
    sums: Sums
    micro_batch: int
    seed: int
    timesteps: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within it, the adapter holds what people get: its average, where one is kept."""
        yield

    def halve_micro_batch(self, where: str) -> None:
        """After running out of memory; not within `except`, whose traceback holds tensors."""
        self.micro_batch = max(1, self.micro_batch // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("out of memory at %s: again with micro-batch %d", where, self.micro_batch)
