"""One global step, from sample names to moved weights.

What is summed is (gradients, loss, flags) of this worker's samples; what follows the sum is
computed from it by every worker alike. So the step is the same mathematics for one worker or eight.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylora.data.steps import SampleRef
from raylora.data.supply import Tensors
from raylora.diffusion.losses import WEIGHING
from raylora.diffusion.noise import draw_noise, draw_timesteps
from raylora.training.loader import micro_batches
from raylora.training.parts import Parts


@dataclass(frozen=True)
class StepResult:
    """What a step left behind.

    Attributes:
        loss: mean over the step's images, on the device.
        gradient_norm: before clipping, on the device.
        images: of the whole step.
        my_images, my_seconds: of this worker, without waiting for the others.
        stop: some worker was asked to stop.
    """

    loss: Tensor
    gradient_norm: Tensor
    images: int
    my_images: int
    my_seconds: float
    wait_seconds: float
    stop: bool


def train_step(parts: Parts, step: int, *, stop: bool = False) -> StepResult:
    """Move the adapter by one global step; `stop` is this worker's wish to leave after it."""
    began = time.perf_counter()
    samples, tensors, images = parts.loader.take(step)
    fetched = time.perf_counter()
    accumulate(parts, step, samples, tensors)
    if parts.device.type == "cuda" and parts.group.size > 1:
        torch.cuda.synchronize(parts.device)  # so that the seconds are this worker's own
    computed = time.perf_counter()

    loss_sum, leaving = parts.sums.add_up(parts.group, stop=stop)
    gradients = parts.adapter.gradients.div_(images)
    gradient_norm = torch.linalg.vector_norm(gradients)
    if parts.max_grad_norm > 0:
        gradients.mul_((parts.max_grad_norm / (gradient_norm + 1e-6)).clamp(max=1.0))
    for group in parts.optimizer.param_groups:
        group["lr"] = parts.learning_rate * parts.factor(step)
    parts.optimizer.step()

    return StepResult(
        loss=loss_sum / images,
        gradient_norm=gradient_norm,
        images=images,
        my_images=len(samples),
        my_seconds=computed - fetched,
        wait_seconds=fetched - began,
        stop=bool(leaving) if parts.group.size > 1 else stop,  # alone, the device is not asked
    )


def accumulate(
    parts: Parts, step: int, samples: Sequence[SampleRef], tensors: Sequence[Tensors]
) -> None:
    """Take this worker's losses and gradients; out of memory halves the micro-batch and replays.

    Everything drawn depends on (seed, step, sample) alone, so the replay is the same step.
    """
    while True:
        parts.sums.begin()
        try:
            for mates, batch in micro_batches(samples, tensors, parts.micro_batch):
                numbers = [sample.number for sample in mates]
                losses = sample_losses(parts, batch, numbers, step)
                losses.sum().backward()
                parts.sums.take(losses)
            return
        except torch.OutOfMemoryError:
            if parts.micro_batch == 1:
                raise
        parts.halve_micro_batch(f"step {step}")


def sample_losses(
    parts: Parts, batch: dict[str, Tensor], numbers: Sequence[int], step: int
) -> Tensor:
    """The loss of each sample, (B,), with the noise and timestep that belong to (step, sample)."""
    latents = batch["latents"]
    low, high = parts.timesteps
    noise = draw_noise(tuple(latents.shape[1:]), seed=parts.seed, step=step, samples=numbers)
    timesteps = draw_timesteps(low=low, high=high, seed=parts.seed, step=step, samples=numbers)
    return losses_at(parts, batch, noise, timesteps)


def losses_at(parts: Parts, batch: dict[str, Tensor], noise: Tensor, timesteps: Tensor) -> Tensor:
    """The loss of each sample at given noise (B, C, H, W) and timesteps (B,); (B,)."""
    exact = parts.adapter.values.dtype
    latents = batch["latents"].to(parts.device, exact, non_blocking=True)
    noise = noise.to(parts.device, exact, non_blocking=True)
    timesteps = timesteps.to(parts.device, non_blocking=True)
    weighing = {
        name: batch[name].to(parts.device, exact, non_blocking=True)
        for name in WEIGHING
        if name in batch
    }
    conditions = {
        name: tensor.to(parts.device, parts.dtype, non_blocking=True)
        for name, tensor in batch.items()
        if name != "latents" and name not in WEIGHING
    }
    noisy = parts.process.noisy(latents, noise, timesteps).to(parts.dtype)
    target = parts.process.target(latents, noise, timesteps)
    prediction = parts.predict(parts.denoiser, noisy, timesteps, conditions)
    return parts.loss(prediction, target, timesteps, weighing)
