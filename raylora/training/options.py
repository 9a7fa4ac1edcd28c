"""Options of the trainer: length, randomness, precision, saving, validation, logging."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raylora.base.options import Options

MOST_EXACT_IMAGES = 2**11 - 1
"""Images a step that 64-bit sums hold."""
MICRO_BATCH = 8
"""Images together where a job does not say."""


class TrainingOptions(Options):
    """How long, from which seed, how exact."""

    steps: int | None = Field(None, ge=1)
    """Global steps. Give this or epochs."""
    epochs: float | None = Field(None, gt=0)
    """Times that every image is seen `repeats` times. Give this or steps."""
    images_per_step: int = Field(4, ge=1)
    """Images in one global step, over all workers; what others call the effective batch."""
    seed: int = Field(0, ge=0, lt=2**63)
    """From it come first weights, noise, timesteps; the same on any fleet."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Arithmetic of the base and the activations, one choice for the whole fleet; the adapter and
    the optimizer stay in fp32 (fp64 in fp64, which is for tests)."""
    sums: Literal["fast", "exact"] = "fast"
    """fast: workers, shares and micro-batches change the rounding, which training amplifies. exact:
    images go through one at a time and are added in 64-bit integers, so any number of workers on
    machines of one kind computes the same bits; slower where micro-batches would help."""
    min_timestep: int = Field(0, ge=0)
    """Lowest timestep that is drawn."""
    max_timestep: int | None = Field(None, ge=1)
    """One past the highest timestep that is drawn; null is all of the base's."""
    save_every_steps: int | None = Field(None, ge=1)
    """Global steps between checkpoints; null saves only at the end."""
    keep_last: int | None = Field(None, ge=1)
    """How many checkpoints stay; null keeps all."""

    @model_validator(mode="after")
    def _exact_fits(self) -> Self:
        if self.sums == "exact" and self.images_per_step > MOST_EXACT_IMAGES:
            raise ValueError(
                f"training.sums: exact adds at most {MOST_EXACT_IMAGES} images a step, and "
                f"training.images_per_step is {self.images_per_step}. Lower it, or choose fast."
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of training.steps and training.epochs.")
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError(
                f"training.max_timestep {self.max_timestep} must be above min_timestep "
                f"{self.min_timestep}."
            )
        return self


class ValidationOptions(Options):
    """The held-out loss, at fixed timesteps and fixed noise, so that its curve is smooth."""

    folder: str | None = None
    """Images that are never trained on; same form as data.folder. Null: no validation."""
    every_steps: int = Field(100, ge=1)
    """Global steps between measurements; there is always one at step 0 and at the end."""
    timesteps: tuple[int, ...] = Field((150, 400, 650, 900), min_length=1)
    """Every held-out image is measured at each of these."""


class MemoryOptions(Options):
    """What a worker may hold at once."""

    max_micro_batch: int | None = Field(None, ge=1)
    """Images that go through the denoiser together, at most; out of memory halves it. Null is 8, or
    1 where training.sums is exact, which allows no more."""
    encode_batch: int | None = Field(None, ge=1)
    """Pictures that go through the VAE together when they are cached; null is 1 on a CPU and what
    its free memory holds on a GPU. Out of memory halves it."""


class ExportOptions(Options):
    """The LoRA file."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Numbers in the file; alpha is always float32."""
    title: str | None = None
    """modelspec.title; null is the run's name."""
    author: str | None = None
    """modelspec.author."""
    comment: str | None = None
    """ss_training_comment."""


class LogOptions(Options):
    """What is said while it runs."""

    every_steps: int = Field(10, ge=1)
    """Global steps between progress lines; the device is not waited for in between."""
