"""Options of the trainer: length, randomness, precision, saving, validation, logging."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from raylora.adapt.export_options import ExportOptions as ExportOptions
from raylora.base.options import Options, known_as

MOST_EXACT_IMAGES = 2**11 - 1
"""Images a step that 64-bit sums hold."""
MICRO_BATCH = 8
"""Images together where a job does not say."""


class TrainingOptions(Options):
    """How long, from which seed, how exact."""

    steps: int | None = Field(
        None,
        ge=1,
        json_schema_extra=known_as(sd_scripts="--max_train_steps (counted on each process there)"),
    )
    """Global steps. Give this or epochs."""
    epochs: float | None = Field(
        None, gt=0, json_schema_extra=known_as(sd_scripts="--max_train_epochs")
    )
    """Times that every image is seen `repeats` times. Give this or steps."""
    images_per_step: int = Field(
        4,
        ge=1,
        json_schema_extra=known_as(
            sd_scripts="--train_batch_size times --gradient_accumulation_steps times "
            "--num_processes"
        ),
    )
    """Images in one global step, over all workers; what others call the effective batch."""
    seed: int | None = Field(
        0, ge=0, lt=2**63, json_schema_extra=known_as(sd_scripts="--seed (blank where not given)")
    )
    """From it come first weights, noise, timesteps; the same on any fleet. Null draws one when the
    run begins, and writes it into the run's job."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32",
        json_schema_extra=known_as(
            formula="fp16: the loss times a power of two, gradients divided by it; halved and the "
            "step done again where that overflows, doubled after 2000 clean steps",
            source="Micikevicius et al. 2018, arXiv 1710.03740",
            sd_scripts="--mixed_precision",
        ),
    )
    """Arithmetic of the base and the activations, one choice for the whole fleet; the adapter and
    the optimizer stay in fp32 (fp64 in fp64, which is for tests). bf16 wants an Ampere GPU or
    newer; fp16, with its loss scaled, is for older ones."""
    on_nan: Literal["stop", "skip"] = Field(
        "stop", json_schema_extra=known_as(sd_scripts="none: it goes on with NaN")
    )
    """What a step does whose gradient is not finite. stop: the run ends with the reason, and its
    newest checkpoint is good. skip: nothing moves in that step, and the run goes on, unless that
    happens ten times in a row; the device is asked at every step, which costs a little speed on a
    GPU."""
    sums: Literal["fast", "exact"] = "fast"
    """fast: workers, shares and micro-batches change the rounding, which training amplifies. exact:
    images go through one at a time and are added in 64-bit integers, so any number of workers on
    machines of one kind computes the same bits; slower where micro-batches would help."""
    min_timestep: int = Field(0, ge=0)
    """Lowest timestep that is drawn."""
    max_timestep: int | None = Field(
        None,
        ge=1,
        json_schema_extra=known_as(
            formula="of what is drawn from 0 to 1: min_timestep + (max_timestep - min_timestep) x",
        ),
    )
    """One past the highest timestep that is drawn; null is all of the base's. A flow model's
    timesteps are 1000 sigma, 0 to 1000; sd-scripts passes over both options for FLUX."""
    save_every_steps: int | None = Field(
        None, ge=1, json_schema_extra=known_as(sd_scripts="--save_every_n_steps")
    )
    """Global steps between checkpoints; null saves only at the end. Give this or
    save_every_epochs."""
    save_every_epochs: int | None = Field(
        None, ge=1, json_schema_extra=known_as(sd_scripts="--save_every_n_epochs")
    )
    """Epochs between checkpoints: a checkpoint is saved after the last step of each of them."""
    keep_last: int | None = Field(
        None,
        ge=1,
        json_schema_extra=known_as(sd_scripts="--save_last_n_steps, --save_last_n_epochs"),
    )
    """How many checkpoints stay; null keeps all."""
    keep_best: bool = Field(
        False,
        json_schema_extra=known_as(formula="least `validation` of steps 1 and later"),
    )
    """Save a checkpoint whenever the held-out loss is the lowest so far, let `keep_last` spare it,
    and leave `<name>-best.safetensors` at the end where that is not the last. The measurement
    before the first step does not count: it is the base's."""

    @model_validator(mode="after")
    def _exact_fits(self) -> Self:
        if self.sums == "exact" and self.images_per_step > MOST_EXACT_IMAGES:
            raise ValueError(
                f"training.sums: exact adds at most {MOST_EXACT_IMAGES} images a step, and "
                f"training.images_per_step is {self.images_per_step}. Lower it, or choose fast."
            )
        return self

    @model_validator(mode="after")
    def _one_pace(self) -> Self:
        if self.save_every_steps is not None and self.save_every_epochs is not None:
            raise ValueError(
                "training.save_every_steps and training.save_every_epochs: give one of them."
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


DEFAULT_VALIDATE_STEPS = 100


class ValidationOptions(Options):
    """The held-out loss, at fixed timesteps and fixed noise, so that its curve is smooth."""

    folder: str | None = None
    """Images that are never trained on; same form as data.folder. Null: no validation."""
    every_steps: int | None = Field(
        None, ge=1, json_schema_extra=known_as(sd_scripts="--validate_every_n_steps")
    )
    """Global steps between measurements, 100 where every_epochs is not given either; there is
    always one at step 0 and at the end."""
    every_epochs: int | None = Field(
        None, ge=1, json_schema_extra=known_as(sd_scripts="--validate_every_n_epochs")
    )
    """Epochs between measurements. Give this or every_steps."""
    timesteps: tuple[int, ...] = Field(
        (150, 400, 650, 900),
        min_length=1,
        json_schema_extra=known_as(
            formula="validation/t: mean over images at timestep t; validation: mean over all t",
            sd_scripts="fixed there: 4 from 200 to 800",
        ),
    )
    """Every held-out image is measured at each of these, with noise of its own that is the same
    each time; the mean at each is a band of its own in the curves."""
    training_images: int = Field(
        0,
        ge=0,
        json_schema_extra=known_as(
            formula="overfitting: validation > 1.02 times its lowest, and training below what it "
            "was then, 3 measurements in a row"
        ),
    )
    """So many images that are trained on are measured with the same ruler (`training`,
    `training/<t>`), always the same ones; 16 to 64 do. With them a run says once when it overfits:
    the held-out loss rises while theirs falls. 0: none, and no such warning."""
    patience: int | None = Field(
        None,
        ge=1,
        json_schema_extra=known_as(formula="stop after N measurements in a row without a new low"),
    )
    """End the run early after so many measurements without an improvement; it is then finished
    like any other. Null: all steps."""
    min_delta: float = Field(
        0.0,
        ge=0,
        lt=1,
        json_schema_extra=known_as(formula="improved: validation < (1 - min_delta) * the low"),
    )
    """What counts as an improvement for `patience`, as a part of the loss: 0.01 is one percent."""

    @model_validator(mode="before")
    @classmethod
    def _some_pace(cls, given: Any) -> Any:
        paces = ("every_steps", "every_epochs")
        if isinstance(given, dict) and all(given.get(word) is None for word in paces):
            return {**given, "every_steps": DEFAULT_VALIDATE_STEPS}
        return given

    @model_validator(mode="after")
    def _one_pace(self) -> Self:
        if self.every_steps is not None and self.every_epochs is not None:
            raise ValueError(
                f"validation.every_steps is {self.every_steps} and validation.every_epochs is "
                f"{self.every_epochs}: give one of them (the other is null)."
            )
        return self

    @model_validator(mode="after")
    def _each_timestep_once(self) -> Self:
        twice = sorted({t for t in self.timesteps if self.timesteps.count(t) > 1})
        if twice:
            raise ValueError(f"validation.timesteps names {twice} twice. Name each once.")
        return self

    @model_validator(mode="after")
    def _delta_is_of_patience(self) -> Self:
        if self.min_delta and self.patience is None:
            raise ValueError(
                f"validation.min_delta is {self.min_delta:g}, and without validation.patience "
                "nothing asks whether the loss improved enough. Give patience, or leave it out."
            )
        return self


def held_out_problems(
    training: TrainingOptions, validation: ValidationOptions, *, held_out: bool, live: bool
) -> list[str]:
    """What cannot be without held-out images, or without a cache, one sentence each.

    Args:
        held_out: the job has a validation.folder or a validation_split.
        live: pictures are encoded as they are shown.
    """
    asked = {
        "training.keep_best": training.keep_best,
        "validation.patience": validation.patience is not None,
        "validation.training_images": validation.training_images > 0,
    }
    found = [
        f"{word} compares held-out losses, and nothing is held out. Give validation.folder or "
        "data.validation_split, or leave it out."
        for word, there in asked.items()
        if there and not held_out
    ]
    if validation.training_images and live:
        found.append(
            f"validation.training_images is {validation.training_images}, and with data.cache: "
            "none no image that is trained on has a fixed encoding. Give a cache, or set it to 0."
        )
    return found


class WandbOptions(Options):
    """Curves on Weights & Biases. The key comes from the environment alone (WANDB_API_KEY)."""

    project: str = Field("raylora", min_length=1)
    """The project there."""
    entity: str | None = None
    """The team or person there; null is the key's own."""
    group: str | None = None
    """Runs of one group are shown together."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to a local folder (WANDB_DIR, or wandb/), for `wandb sync` later."""


class LogOptions(Options):
    """What is said while it runs."""

    every_steps: int = Field(10, ge=1)
    """Global steps between progress lines; the device is not waited for in between."""
    tensorboard: bool = Field(
        False, json_schema_extra=known_as(sd_scripts="--log_with tensorboard --logging_dir")
    )
    """Write TensorBoard event files to the run's folder, `tensorboard/`. Needs
    `pip install "raylora[tensorboard]"`."""
    wandb: WandbOptions | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--log_with wandb --wandb_run_name")
    )
    """Send curves to Weights & Biases; `wandb: {}` takes the defaults, null sends nothing. A
    resumed run goes on in the same one there. Needs `pip install "raylora[wandb]"`."""
