"""What a worker trains with; put together once, by `assemble.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from raylora.adapt.attach import Adapter, Attachment
from raylora.adapt.norm_cap import NormCap
from raylora.diffusion.losses import SampleLoss
from raylora.diffusion.noise import NoiseSource
from raylora.diffusion.process import AnyProcess
from raylora.diffusion.timesteps import TimestepSource
from raylora.families import Models
from raylora.optim.groups import Group as ParameterGroup
from raylora.optim.state import shown_values
from raylora.training.ema import Ema
from raylora.training.fitting import Fitting
from raylora.training.fused import Fused
from raylora.training.graphs import Graphs
from raylora.training.loader import Loader
from raylora.training.loss_scale import LossScale
from raylora.training.reduce import Group
from raylora.training.shares import Shares
from raylora.training.sums import Sums

Predict = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
ReadText = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Mover:
    """How the adapter is moved.

    Attributes:
        optimizer: over the adapter's groups.
        groups: what moves at one rate, as the pieces of the adapter's buffer.
        rates: global step -> rate of each group; None where the optimizer finds its own.
        text_stops: global step from which the text encoder stays as it is; None is never.
        max_grad_norm: the whole gradient is shortened to this; 0 leaves it.
        cap: of each layer's change of weight, after the step.
    """

    optimizer: torch.optim.Optimizer
    groups: Sequence[ParameterGroup]
    rates: Callable[[int], Sequence[float]] | None
    max_grad_norm: float
    text_stops: int | None = None
    cap: NormCap | None = None

    @property
    def names(self) -> list[str]:
        """Of the groups."""
        return [group.name for group in self.groups]

    def stopped(self, step: int) -> bool:
        """Whether the text encoder stays as it is in a step."""
        return self.text_stops is not None and step >= self.text_stops

    def estimates(self) -> dict[str, float]:
        """What an optimizer that finds its rate has found: its `d`, by group."""
        found = [group["d"] for group in self.optimizer.param_groups if "d" in group]
        names = [f"d/{name}" for name in self.names] if len(found) > 1 else ["d"]
        return {name: float(d) for name, d in zip(names, found, strict=False)}

    def rates_now(self, step: int) -> dict[str, float]:
        """Rates at a step, by group; of an optimizer that finds its own, what it last used."""
        if self.rates is not None:
            return dict(zip(self.names, self.rates(step), strict=True))
        held = [group.get("lr") for group in self.optimizer.param_groups]
        return {n: float(rate or 0.0) for n, rate in zip(self.names, held, strict=True)}


@dataclass
class Parts:
    """A worker's share of a run.

    Attributes:
        denoiser: frozen; the adapter is attached to it, to the text encoders, or to both.
        text_encoders: those that are read in training; none where captions are cached.
        predict: the family's prediction.
        read_text: a batch's captions -> conditions of the prediction.
        loss: (prediction, target, timesteps, weighing) -> (B,).
        noise: what is drawn for a sample.
        mover: optimizer and rates.
        loader: the samples of each step, and their cached tensors.
        sums: how gradients and losses are added up.
        fitting: what is done to fit the device, and the way down where that is not enough.
        dtype: of activations; losses and the adapter are in `adapter.values.dtype`.
        timesteps: which are drawn for a sample.
        skip_broken: a step whose gradient is not finite moves nothing, and the run goes on.
        fused: `sums` where the adapter is moved within the backward pass; None elsewhere.
        under: a frozen adapter beneath the trained one, on while training and measuring and off
            for people (`family.training_adapter`); None is none.
        graphs: what computes a micro-batch, recorded where that is possible.
        leave_host: gives back host memory of the models; nothing is run with them after it.
    """

    denoiser: nn.Module
    text_encoders: Models
    attachments: Sequence[Attachment]
    adapter: Adapter
    predict: Predict
    read_text: ReadText
    process: AnyProcess
    loss: SampleLoss
    noise: NoiseSource
    mover: Mover
    ema: Ema | None
    loss_scale: LossScale
    loader: Loader
    group: Group
    shares: Shares
    sums: Sums
    fitting: Fitting
    seed: int
    timesteps: TimestepSource
    dtype: torch.dtype
    device: torch.device
    skip_broken: bool = False
    under: Adapter | None = None
    graphs: Graphs = field(default_factory=Graphs)
    fused: Fused | None = None
    leave_host: Callable[[], None] = lambda: None

    @property
    def micro_batch(self) -> int:
        """Images that go through the denoiser together, at most."""
        return self.fitting.setting.micro_batch

    @property
    def asks_if_broken(self) -> bool:
        """Whether a step must know at once that its gradient is not finite."""
        return self.skip_broken or self.loss_scale.on

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within it, the adapter holds what people get: its average, where one is kept."""
        again, where = self.fitting.again, "showing the average"
        with ExitStack() as stack:
            optimizer = self.mover.optimizer
            again(lambda: stack.enter_context(shown_values(optimizer)), where)
            if self.ema:
                shown = self.ema.shown
                again(lambda: stack.enter_context(shown()), where)
            yield

    @contextmanager
    def as_drawn(self) -> Iterator[None]:
        """Within it, the models are those that people draw with: nothing is under the adapter."""
        with self.under.off() if self.under else nullcontext():
            yield
