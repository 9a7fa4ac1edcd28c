"""The models of a job: its base, with what is merged into it, and the adapter that is trained."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import nn

from raylora.adapt.attach import Adapter, Attachment, first_weights
from raylora.adapt.dropout import Dropout
from raylora.adapt.initial import Initial, initial_weights
from raylora.adapt.lora_file import AdapterFile, read_adapter
from raylora.adapt.merge import file_parts, merge_lora
from raylora.base.errors import MissingObject, StorageError, WeightsError
from raylora.base.fetch import local_folder
from raylora.base.site import Site
from raylora.base.storage import open_storage
from raylora.families import BaseLora, Family, Models, get_family
from raylora.job import Job, with_overrides
from raylora.networks import get_network
from raylora.optim.groups import Group, make_groups, trained_sites

PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float32),
    "fp64": (torch.float64, torch.float64),
}
"""(activations and base, adapter and optimizer)."""


def open_family(job: Job) -> Family:
    """The base model, its weights fetched to this machine where they are elsewhere.

    Raises:
        WeightsError: the base, its VAE or a LoRA that is to be merged is not there or does not fit.
    """
    options = job.family
    make, _ = get_family(options.kind)
    if options.vae is not None:
        vae = local_folder(options.vae, word="family.vae")
        options = options.model_copy(update={"vae": str(vae)})
    family = make(local_folder(options.weights), options)
    if options.loras:
        files = [
            (_read_file(one.file, f"family.loras.{i}.file"), one)
            for i, one in enumerate(options.loras)
        ]
        held = [
            (_adapter(data, f"family.loras.{i}.file {one.file}"), one.strength)
            for i, (data, one) in enumerate(files)
        ]
        family.alter = _merging(held)
        family.altered = _names(files)
    return family


def with_seed(job: Job) -> Job:
    """The job with a seed: its own, the one that its run drew when it began, or a new one."""
    if job.training.seed is not None:
        return job
    try:
        recorded = yaml.safe_load(open_storage(job.store).within(job.run_folder).read("job.yaml"))
        seed = recorded["training"]["seed"]
    except MissingObject:
        seed = secrets.randbelow(2**32)  # as wide as every program's field for it
    return with_overrides(job, {"training.seed": seed})


def _merging(held: Sequence[tuple[AdapterFile, float]]) -> Callable[[str, nn.Module], None]:
    def merge(component: str, model: nn.Module) -> None:
        for file, strength in held:
            merge_lora(component, model, file, strength)

    return merge


def _names(files: Sequence[tuple[bytes, BaseLora]]) -> dict[str, str]:
    """What names the models that the files change, by component: all that is merged, in order."""
    merged: dict[str, list[tuple[str, float]]] = {}
    for data, one in files:
        for component in file_parts(read_adapter(data)):
            name = hashlib.sha256(data).hexdigest()
            merged.setdefault(component, []).append((name, one.strength))
    return {
        component: hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        for component, what in merged.items()
    }


def _read_file(url: str, word: str) -> bytes:
    folder, _, name = url.rpartition("/")
    if not name or Path(url).is_dir():
        raise WeightsError(f"{word} is {url!r}, which is no file. Give a LoRA's .safetensors.")
    try:
        return open_storage(folder or ".").read(name)
    except MissingObject:
        raise WeightsError(f"{word}: there is no file {url}. Give a LoRA's .safetensors.") from None
    except StorageError as error:
        raise WeightsError(f"{word}: {error}") from error


def _adapter(data: bytes, called: str) -> AdapterFile:
    """What a file holds; its mistakes are told under the option that names it."""
    try:
        return read_adapter(data)
    except WeightsError as error:
        raise WeightsError(f"{called}: {error}") from error


@dataclass(frozen=True)
class Adapted:
    """The models that training runs, with the adapter on them.

    Attributes:
        text_encoders: by component; none where captions are cached.
        groups: what moves at one rate, as the pieces of the adapter's buffer.
    """

    denoiser: nn.Module
    text_encoders: Models
    adapter: Adapter
    attachments: list[Attachment]
    groups: list[Group]


def load_adapted(job: Job, family: Family, device: torch.device) -> Adapted:
    """The denoiser, the text encoders where they are trained, and a new adapter on them.

    Raises:
        WeightsError: `network.initial` does not fit.
    """
    dtype, exact = PRECISIONS[job.training.precision]
    network = job.network
    denoiser = family.load_denoiser(dtype=dtype, device=device)
    encoders: Models = {}
    if network.trains_text:
        encoders = family.load_text_encoders(dtype=dtype, device=device)
    if job.memory.gradient_checkpointing:
        family.checkpoint_blocks(denoiser, encoders)
    first = first_of(job, family, denoiser, encoders)
    groups = make_groups(
        job.optimizer,
        first.sites,
        lambda site: list(first.weights[site.name]),
        job.training.images_per_step,
    )
    adapter = Adapter(
        get_network(network.kind),
        first.sites,
        first.weights,
        first.scales,
        dtype=exact,
        device=device,
        groups=[group.members for group in groups],
    )
    if network.dropout or network.rank_dropout or network.module_dropout:
        adapter.dropout = Dropout(network, seed=job.seed)
    models = {family.component: denoiser, **encoders}
    attachments = [Attachment(model, component, adapter) for component, model in models.items()]
    return Adapted(denoiser, encoders, adapter, attachments, groups)


def files_fit(job: Job, family: Family) -> None:
    """Try the LoRA files that the job names on the base's layers, without its weights.

    Raises:
        WeightsError: one is for another base, or has what the job does not train.
    """
    denoiser, encoders = family.skeletons()
    for component, model in {family.component: denoiser, **encoders}.items():
        family.alter(component, model)
    first_of(job, family, denoiser, encoders)


def first_of(job: Job, family: Family, denoiser: nn.Module, encoders: Models) -> Initial:
    """Which layers carry the adapter, and what they start from, fresh or from a file.

    Args:
        denoiser, encoders: loaded, or `family.skeletons`.

    Raises:
        WeightsError: `network.initial` does not fit.
        OptionError: no layer is left to train.
    """
    options, sites = job.network, []
    if options.trains_denoiser:
        sites += family.sites(denoiser, options.layers, convolutions=options.convolutions)
    if options.trains_text:
        sites += family.text_sites(encoders, options.layers)
    return _first(job, trained_sites(job.optimizer, sites))


def _first(job: Job, sites: Sequence[Site]) -> Initial:
    network, options = get_network(job.network.kind), job.network
    fresh = partial(first_weights, network, options, seed=job.seed)
    if options.initial is None:
        scales = {site.name: options.scale_at(site) for site in sites}
        return Initial(list(sites), dict(fresh(sites)), scales)
    data = _read_file(options.initial, "network.initial")
    file = _adapter(data, f"network.initial {options.initial}")
    return initial_weights(file, sites, options, lambda site: fresh([site])[site.name])
