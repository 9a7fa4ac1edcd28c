"""One global step, from sample names to moved weights.

What is summed is (gradients, loss, flags) of this worker's samples; what follows the sum is
computed from it by every worker alike. So the step is the same mathematics for one worker or eight.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from raylora.data.steps import SampleRef
from raylora.data.supply import PRESERVE, UNCAST, Tensors
from raylora.diffusion.losses import WEIGHING
from raylora.optim.groups import leave_out
from raylora.training.loader import count_batches, micro_batches
from raylora.training.parts import Parts
from raylora.training.undo import undone_without_memory


@dataclass(frozen=True)
class StepResult:
    """What a step left behind.

    Attributes:
        loss: mean over the step's images, on the device.
        gradient_norm: before clipping, on the device.
        images: of the whole step.
        my_images, my_seconds: of this worker, without waiting for the others.
        stop: some worker was asked to stop.
        skipped: the gradient was not finite, so nothing moved.
        rates: group of parameters -> learning rate.
        extra: other numbers of the step by name, on the device or not.
    """

    loss: Tensor
    gradient_norm: Tensor
    images: int
    my_images: int
    my_seconds: float
    wait_seconds: float
    stop: bool
    skipped: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Tensor | float] = field(default_factory=dict)


def train_step(parts: Parts, step: int, *, stop: bool = False) -> StepResult:
    """Move the adapter by one global step; `stop` is this worker's wish to leave after it."""
    began = time.perf_counter()
    samples, tensors, images = parts.loader.take(step)
    fetched = time.perf_counter()
    rates = parts.mover.rates_now(step)
    if parts.fused:
        parts.fused.prepare(images, rates, text_stopped=parts.mover.stopped(step))
    while True:
        computing = time.perf_counter()
        accumulate(parts, step, samples, tensors)
        if parts.device.type == "cuda" and parts.group.size > 1:
            torch.cuda.synchronize(parts.device)  # so that the seconds are this worker's own
        computed = time.perf_counter()
        loss_sum, leaving = parts.sums.add_up(parts.group, stop=stop)
        gradients = parts.adapter.gradients.div_(images)
        gradient_norm = torch.linalg.vector_norm(gradients)
        if parts.fused:
            gradient_norm = parts.fused.gradient_norm()
        # Only where something hangs on it is the device asked.
        broken = parts.asks_if_broken and not bool(gradient_norm.isfinite())
        if not (broken and parts.loss_scale.overflowed()):
            break

    skipped = broken and parts.skip_broken
    extra = {} if skipped else move(parts, step, gradient_norm, rates)
    return StepResult(
        loss=loss_sum / images,
        gradient_norm=gradient_norm,
        images=images,
        my_images=len(samples),
        my_seconds=computed - computing,
        wait_seconds=fetched - began,
        stop=bool(leaving) if parts.group.size > 1 else stop,  # alone, the device is not asked
        skipped=skipped,
        rates=rates,
        extra=extra,
    )


def move(
    parts: Parts, step: int, gradient_norm: Tensor, rates: Mapping[str, float]
) -> dict[str, Tensor | float]:
    """From the step's whole gradient to moved weights; the same on every worker."""
    move_now = partial(_move, parts, step, gradient_norm, rates)
    if not parts.fitting.limited:
        return move_now()

    def undone() -> dict[str, Tensor | float]:
        with undone_without_memory(parts):
            return move_now()

    return parts.fitting.again(undone, f"the end of step {step + 1}")


def _move(
    parts: Parts, step: int, gradient_norm: Tensor, rates: Mapping[str, float]
) -> dict[str, Tensor | float]:
    mover, gradients = parts.mover, parts.adapter.gradients
    if mover.max_grad_norm > 0:
        gradients.mul_((mover.max_grad_norm / (gradient_norm + 1e-6)).clamp(max=1.0))
    for piece, group in zip(parts.adapter.groups, mover.groups, strict=True):
        if group.sign < 0:  # a negative rate: the same way, backwards
            gradients[piece].neg_()
    if mover.rates is not None:
        for held, rate in zip(mover.optimizer.param_groups, rates.values(), strict=True):
            held["lr"] = rate
    if mover.stopped(step):
        leave_out(mover.optimizer, mover.groups, "text_encoder")
    (parts.fused.finish if parts.fused else mover.optimizer.step)()
    extra: dict[str, Tensor | float] = {**mover.estimates()}
    if mover.cap:
        extra |= mover.cap.apply()
    if parts.ema:
        parts.ema.update(step + 1)
    extra |= parts.loss_scale.passed()
    return extra


def accumulate(
    parts: Parts, step: int, samples: Sequence[SampleRef], tensors: Sequence[Tensors]
) -> None:
    """Take this worker's losses and gradients; out of memory begins again, with less at once.

    Everything drawn depends on (seed, step, sample) alone, so the replay is the same step.
    """

    def whole() -> None:
        parts.sums.begin(count_batches(samples, parts.micro_batch))
        for mates, batch in micro_batches(samples, tensors, parts.micro_batch):
            accumulate_batch(parts, step, [sample.number for sample in mates], batch)

    parts.fitting.again(whole, f"step {step + 1}")


def accumulate_batch(
    parts: Parts, step: int, numbers: Sequence[int], batch: Mapping[str, Tensor]
) -> None:
    """Take one micro-batch; a function, since its losses hold all activations."""
    scale, learns = parts.loss_scale.factor, not parts.mover.stopped(step)
    given = {**batch, **drawn(parts, batch["latents"], numbers, step)}

    def compute(given: Mapping[str, Tensor]) -> Tensor:
        losses = _losses_given(parts, given, text_learns=learns)
        (losses.sum() * scale).backward()
        return losses.detach()

    with parts.adapter.dropping(step, numbers), parts.adapter.rounded_to(parts.dtype):
        losses = parts.graphs.compute((scale, learns), given, compute)
    parts.sums.take(losses, scale=scale)


def sample_losses(
    parts: Parts, batch: Mapping[str, Tensor], numbers: Sequence[int], step: int
) -> Tensor:
    """The loss of each sample, (B,), with what is drawn for (step, sample)."""
    given = {**batch, **drawn(parts, batch["latents"], numbers, step)}
    return _losses_given(parts, given, text_learns=not parts.mover.stopped(step))


NOISE, NOISED_WITH, TIMESTEPS = DRAWN = ("noise", "noised_with", "timesteps")
"""What is drawn for a micro-batch, beside what is fetched."""


def drawn(parts: Parts, latents: Tensor, numbers: Sequence[int], step: int) -> dict[str, Tensor]:
    """What belongs to (step, sample), by its names in `DRAWN`; on the CPU."""
    noise, noised_with = parts.noise.draw(latents, seed=parts.seed, step=step, samples=numbers)
    size = (latents.shape[2], latents.shape[3])
    timesteps = parts.timesteps.draw(size, seed=parts.seed, step=step, samples=numbers)
    found = {NOISE: noise, TIMESTEPS: timesteps}
    return found if noised_with is None else {**found, NOISED_WITH: noised_with}


def _losses_given(parts: Parts, given: Mapping[str, Tensor], *, text_learns: bool) -> Tensor:
    """Of a micro-batch with what is drawn for it."""
    return losses_at(
        parts,
        given,
        given[NOISE],
        given[TIMESTEPS],
        noised_with=given.get(NOISED_WITH),
        text_learns=text_learns,
    )


def losses_at(
    parts: Parts,
    batch: Mapping[str, Tensor],
    noise: Tensor,
    timesteps: Tensor,
    *,
    noised_with: Tensor | None = None,
    text_learns: bool = True,
) -> Tensor:
    """The loss of each sample at given noise (B, C, H, W) and timesteps (B,); (B,).

    Args:
        noised_with: what the latents are noised with, where it is not what is predicted.
        text_learns: gradients reach the text encoder.
    """
    exact = parts.adapter.values.dtype

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(parts.device, exact, non_blocking=True)

    latents, noise = placed(batch["latents"]), placed(noise)
    timesteps = timesteps.to(parts.device, non_blocking=True)
    weighing = {name: placed(batch[name]) for name in WEIGHING if name in batch}
    noised_with = noise if noised_with is None else placed(noised_with)
    noisy = parts.process.noisy(latents, noised_with, timesteps).to(parts.dtype)
    target = parts.process.target(latents, noise, timesteps)
    predict = partial(predict_at, parts, batch, noisy, timesteps, text_learns=text_learns)
    if PRESERVE in batch and bool(batch[PRESERVE].any()):  # on the CPU still
        with torch.no_grad(), parts.adapter.off():
            base = predict().to(exact)
        preserve = placed(batch[PRESERVE]).view(-1, 1, 1, 1) > 0
        target = torch.where(preserve, base, target)
    return parts.loss(predict(), target, timesteps, weighing)


def predict_at(
    parts: Parts,
    batch: Mapping[str, Tensor],
    noisy: Tensor,
    timesteps: Tensor,
    *,
    text_learns: bool = True,
) -> Tensor:
    """What the models say of noisy latents, (B, C, H, W), with the captions of a batch."""
    extras = {n: batch[n].to(parts.device, non_blocking=True) for n in UNCAST if n in batch}
    others = {"latents", PRESERVE, *WEIGHING, *UNCAST, *DRAWN}
    captions = {name: tensor for name, tensor in batch.items() if name not in others}
    with torch.set_grad_enabled(torch.is_grad_enabled() and text_learns):
        conditions = parts.read_text(captions)
    return parts.predict(parts.denoiser, noisy, timesteps, {**conditions, **extras})
