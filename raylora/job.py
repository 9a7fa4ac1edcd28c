"""The job: one YAML, one frozen tree. Everything a run does is decided here and read from here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeAlias

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from raylora.adapt.export_options import naming_problems
from raylora.base.errors import JobError, OptionError
from raylora.base.layer_options import LayerOptions
from raylora.base.lookup import plugins
from raylora.base.options import Options, explain, one_of
from raylora.base.yaml_file import parse_yaml, read_yaml_file
from raylora.data.options import DataOptions, Native, SetOptions, resolve
from raylora.data.variants import variants_of
from raylora.diffusion.losses import LossOptions
from raylora.diffusion.noise import NoiseOptions
from raylora.diffusion.timesteps import TimestepOptions
from raylora.families import FamilyOptions, get_family
from raylora.fleet import FleetOptions
from raylora.memory.options import MemoryOptions
from raylora.networks import NetworkOptions, get_network
from raylora.optim.optimizers import OptimizerOptions
from raylora.optim.schedules import ScheduleOptions
from raylora.optim.together import rate_problems
from raylora.preview.options import PreviewOptions
from raylora.training.ema import EmaOptions
from raylora.training.memory_problems import memory_problems
from raylora.training.options import (
    ExportOptions,
    LogOptions,
    TrainingOptions,
    ValidationOptions,
    held_out_problems,
)

if TYPE_CHECKING:
    AnyFamily: TypeAlias = FamilyOptions
    AnyNetwork: TypeAlias = NetworkOptions
else:

    def _one_of(section: str, options: Mapping[str, type], usual: str | None = None) -> Any:
        """The plug-ins' options as one field type, told apart by `kind`.

        Args:
            usual: the kind of a section that names none; None where one has to be named.
        """
        if len(options) == 1:
            return next(iter(options.values()))

        def with_kind(given: Any) -> Any:
            if not isinstance(given, Mapping):
                return given
            kind = given.get("kind", usual)
            if kind in options:
                return {**given, "kind": kind}
            found = "missing" if kind is None else repr(kind)
            raise ValueError(f"{section}.kind is {found}: input should be {one_of(list(options))}.")

        union = Annotated[reduce(lambda a, b: a | b, options.values()), Field(discriminator="kind")]
        return Annotated[union, BeforeValidator(with_kind)]

    AnyFamily = _one_of(
        "family", {kind: get_family(kind)[1] for kind in plugins("raylora.families")}
    )
    AnyNetwork = _one_of(
        "network", {kind: get_network(kind).options for kind in plugins("raylora.networks")}, "lora"
    )


def _default_network() -> NetworkOptions:
    return get_network("lora").options()


class Job(Options):
    """A training job."""

    name: str
    """The run's name: its folder in the store, and the LoRA file's name."""
    store: str = "results"
    """Where runs and caches live: a folder, file:// or s3://bucket/prefix."""
    family: SerializeAsAny[AnyFamily]
    """Which base model."""
    network: SerializeAsAny[AnyNetwork] = Field(default_factory=_default_network)
    """What is trained on it."""
    optimizer: OptimizerOptions = OptimizerOptions()
    """How it is moved."""
    schedule: ScheduleOptions = ScheduleOptions()
    """How the rate goes over the run."""
    loss: LossOptions = LossOptions()
    """What is minimised."""
    noise: NoiseOptions = NoiseOptions()
    """What is added to the latents, and what is predicted of it."""
    timesteps: TimestepOptions = TimestepOptions()
    """How noisy the latents are made, and how often."""
    data: DataOptions
    """Images and captions."""
    training: TrainingOptions
    """How long, from which seed."""
    ema: EmaOptions = EmaOptions()
    """An average of the weights over the run."""
    validation: ValidationOptions = ValidationOptions()
    """The held-out loss."""
    preview: PreviewOptions = PreviewOptions()
    """Pictures along the way."""
    memory: MemoryOptions = MemoryOptions()
    """What a worker may hold at once."""
    fleet: FleetOptions = FleetOptions()
    """Who computes."""
    export: ExportOptions = ExportOptions()
    """The LoRA file."""
    log: LogOptions = LogOptions()
    """What is said."""

    @model_validator(mode="before")
    @classmethod
    def _text_in_training_is_not_cached(cls, given: Any) -> Any:
        """Captions are read anew where their encoder changes, whatever the job says."""
        if not isinstance(given, Mapping):
            return given
        network, data = given.get("network"), given.get("data")
        trained = isinstance(network, Mapping) and network.get("train", "denoiser") != "denoiser"
        if not trained or not isinstance(data, Mapping):
            return given
        return {**given, "data": {**data, "cache_text": False}}

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(
                f"{name!r} must be letters, digits, dots, dashes and underscores, at most 100, and "
                "start with a letter or digit."
            )
        return name

    @model_validator(mode="after")
    def _one_at_a_time(self) -> Self:
        if self.training.sums == "exact" and (self.memory.max_micro_batch or 1) > 1:
            raise ValueError(
                f"memory.max_micro_batch is {self.memory.max_micro_batch}, and training.sums: "
                "exact takes images one at a time. Leave it out, or choose fast."
            )
        return self

    @model_validator(mode="after")
    def _data_can_be_trained(self) -> Self:
        try:
            sets = self.sets
        except OptionError as error:
            raise ValueError(str(error)) from error
        for problem in _data_problems(self, sets):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        for problem in _part_problems(self):
            raise ValueError(problem)
        return self

    @property
    def seed(self) -> int:
        """`training.seed`, once it is drawn."""
        assert self.training.seed is not None, "check_job draws it"
        return self.training.seed

    @cached_property
    def sets(self) -> tuple[SetOptions, ...]:
        """The sets of images to train on, whole."""
        native = Native(self.family.native_resolution, self.family.bucket_step)
        return resolve(self.data, native)

    @property
    def held_out_set(self) -> SetOptions | None:
        """The images of `validation.folder`, brought to size as the first set's are."""
        folder = self.validation.folder
        return self.sets[0].held_out(folder) if folder is not None else None

    @property
    def run_folder(self) -> str:
        """The run's place in the store."""
        return f"runs/{self.name}"

    @property
    def cache_url(self) -> str:
        """Where encoded images and captions lie."""
        given = None if self.data.pictures_live else self.data.cache
        return given or f"{self.store.rstrip('/')}/caches"

    @property
    def preserves(self) -> bool:
        """Whether what the base draws of some images is kept."""
        return any(options.output_preservation for options in self.sets)

    def plain(self) -> dict[str, Any]:
        """The whole job as plain data, every default written out."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """16 hex digits that name this job's whole content."""
        text = json.dumps(self.plain(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _part_problems(job: Job) -> Iterable[str]:
    """What network, optimizer and the rest do not agree on."""
    network, optimizer = job.network, job.optimizer
    yield from memory_problems(
        *(job.memory, optimizer, job.training, network),
        workers=job.fleet.count,
        preserved=job.preserves,
    )
    if network.initial_ranks and network.initial is None:
        yield (
            "network.initial_ranks takes the ranks of network.initial, which is not given. Give "
            "it, or leave initial_ranks out."
        )
    yield from _initial_problems(network)
    yield from naming_problems(job.export, network, job.family.layout)
    yield from _idle_problems(job)
    yield from rate_problems(
        optimizer,
        job.schedule,
        trains_denoiser=network.trains_denoiser,
        trains_text=network.trains_text,
        network=network.kind,
        fast=get_network(network.kind).fast,
    )
    if optimizer.schedule_free and job.ema.decay is not None:
        yield (
            f"ema.decay: {optimizer.name} keeps an average of its own, and shows that. Leave one "
            "of them out."
        )
    if optimizer.schedule_free and network.max_norm is not None:
        yield (
            f"network.max_norm: {optimizer.name} moves weights that it holds elsewhere, which a "
            "cap would not reach. Leave one of them out."
        )


_OF_THE_FILE = (
    *("rank", "alpha", "conv_rank", "conv_alpha", "scaling", "axis", "tucker", "factor"),
    *("decompose_both", "full_matrix", "unbalanced", "rescale", "on_input"),
)
"""Options of networks that a file to start from decides, where `initial_ranks` says so."""


def _initial_problems(network: NetworkOptions) -> Iterable[str]:
    """What the job says of ranks that are the file's."""
    if not network.initial_ranks:
        return
    for word in (*_OF_THE_FILE, *LayerOptions.model_fields):
        field = type(network).model_fields.get(word)
        value = getattr(network, word) if field else None
        if field is not None and value != field.default:
            yield (
                f"network.{word} is {value}, and with network.initial_ranks it is the file's. "
                "Leave one of them out."
            )


def _idle_problems(job: Job) -> Iterable[str]:
    """Parts that say what nothing of the job uses."""
    network, training = job.network, job.training
    if network.convolutions and not network.trains_denoiser:
        yield (
            f"network.kind is {network.kind}, and the text encoder has no convolutions. Choose "
            "lora, which is the same there, or set network.train: both."
        )
    if job.ema.place != "device" and job.ema.decay is None:
        yield (
            f"ema.place is {job.ema.place}, and no average is kept. Give ema.decay, or leave it "
            "out."
        )
    paces = (training.save_every_steps, training.save_every_epochs)
    if training.keep_last is not None and paces == (None, None) and not training.keep_best:
        yield (
            f"training.keep_last is {training.keep_last}, and only the end is saved. Give "
            "training.save_every_steps or save_every_epochs, or leave it out."
        )
    for number, one in enumerate(job.family.loras):
        if one.strength == 0:
            yield (
                f"family.loras.{number}.strength is 0, which adds nothing. Leave the file out, or "
                "give it a strength."
            )


def _data_problems(job: Job, sets: tuple[SetOptions, ...]) -> Iterable[str]:
    """What sets and the rest of the job do not agree on."""
    data = job.data
    warmed = [options for options in sets if options.token_warmup_step]
    if warmed and not data.texts_live:
        yield (
            f"data.token_warmup_step is {warmed[0].token_warmup_step:g}: how many tags are shown "
            "depends on the step, and cached captions do not. Add data.cache_text: false, which "
            "encodes captions as they are shown."
        )
    for group in sorted({one.group for one in sets if one.is_reg}):
        if all(one.is_reg for one in sets if one.group == group):
            yield (
                f"data: the regularisation images of group {group} have no other images to keep "
                "the balance with. Add a set of the same group without is_reg."
            )
    if any(one.validation_seed for one in sets) and not any(one.validation_split for one in sets):
        yield (
            "data.validation_seed chooses which images data.validation_split holds out, which is "
            "not given. Give it, or leave the seed out."
        )
    if job.validation.folder is not None and any(one.validation_split for one in sets):
        yield "data.validation_split and validation.folder: give one of them."
    yield from held_out_problems(
        job.training,
        job.validation,
        held_out=job.validation.folder is not None or any(one.validation_split for one in sets),
        live=data.pictures_live,
    )
    if data.prior_loss_weight != 1 and not any(options.is_reg for options in sets):
        yield (
            f"data.prior_loss_weight is {data.prior_loss_weight:g}, and no set has is_reg: true. "
            "Mark the regularisation images, or leave it out."
        )
    if job.loss.mask == "plain" and not any(options.masked for options in sets):
        yield (
            "loss.mask is plain, and no set has masks. Give data.alpha_mask or data.mask_folder, "
            "or leave it out."
        )
    if data.variants is not None and not any(
        max(count.pictures, count.texts) == data.variants
        for count in (variants_of(options, data) for options in sets)
    ):
        yield (
            f"data.variants is {data.variants}, and nothing is drawn ahead of training: add what "
            "is to be drawn (shuffle_caption, flip_aug, random_crop, …), or leave it out."
        )


def load_job(path: str | Path, overrides: Iterable[str] = ()) -> Job:
    """Read a job file.

    Args:
        path: the YAML file.
        overrides: `a.b=value` each, the value in YAML; they replace what the file says.

    Raises:
        JobError: everything that is wrong with it, one sentence each.
    """
    tree = read_yaml_file(
        path, wanted="a job file", holds="sections such as family, data and training"
    )
    set_overrides(tree, overrides)
    return job_from(tree)


def job_from(tree: Mapping[str, Any]) -> Job:
    """A job from plain data; JobError names every mistake."""
    try:
        return Job.model_validate(dict(tree))
    except ValidationError as error:
        raise JobError(explain(error, Job)) from None


def with_overrides(job: Job, overrides: Mapping[str, Any]) -> Job:
    """The same job with some dotted paths set, as a sweep does; JobError as for a file."""
    tree = job.plain()
    for path, value in overrides.items():
        _set(tree, path, value)
    return job_from(tree)


def set_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set `a.b=value` each in a tree of sections, the value in YAML; JobError as for a file."""
    for override in overrides:
        _override(tree, override)


def _override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise JobError(f"--set {override}: write it as section.option=value.")
    try:
        _set(tree, path, parse_yaml(text))
    except yaml.YAMLError:
        raise JobError(f"--set {override}: the value is not YAML.") from None


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, word = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise JobError(f"{path}: {section} is a value, not a section.")
    tree[word] = value
