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

from raylora.adapt.attach import Adapter, Attachment, first_weights, weights_in
from raylora.adapt.dropout import Dropout
from raylora.adapt.idle import refuse_idle
from raylora.adapt.initial import Initial, initial_weights
from raylora.adapt.lora_file import AdapterFile, read_adapter
from raylora.adapt.merge import Fitted, file_parts, fitted, merge_lora
from raylora.adapt.onto import Names, all_sites, names_of
from raylora.adapt.under import frozen_adapter
from raylora.base.errors import MissingObject, OptionError, StorageError, WeightsError
from raylora.base.layers import chosen_sites
from raylora.base.lookup import some_of
from raylora.base.site import Site
from raylora.base.storage import open_storage
from raylora.families import BaseLora, Family, Models, get_family
from raylora.job import Job, with_overrides
from raylora.memory.compiled import compile_units
from raylora.memory.host import HostMemory
from raylora.memory.placed import Placed
from raylora.memory.setting import Precision, Setting
from raylora.networks import Arrays, Network, NetworkOptions, get_network
from raylora.optim.groups import Group, make_groups, trained_sites
from raylora.training.fitting import Fits, Fitting
from raylora.training.options import MICRO_BATCH
from raylora.weights.base import open_base

PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float32),
    "fp64": (torch.float64, torch.float64),
}
"""(activations and base, adapter and optimizer)."""
_NAMED = 3  # layers that a message names
_UNDER = "family.training_adapter"


def open_family(job: Job) -> Family:
    """The base model, its weights fetched to this machine where they are elsewhere.

    Raises:
        WeightsError: the base, its VAE or a LoRA that is to be merged is not there or does not fit.
    """
    options = job.family
    make, _ = get_family(options.kind)
    parts = dict(options.parts) if options.vae is None else {**options.parts, "vae": options.vae}
    family = make(open_base(options.weights, kind=options.layout, parts=parts), options)
    if options.loras:
        files = [
            (_read_file(one.file, f"family.loras.{i}.file"), one)
            for i, one in enumerate(options.loras)
        ]
        sites, names = all_sites(family), names_of(family)
        held = [
            _fitted(data, f"family.loras.{i}.file {one.file}", sites, names)
            for i, (data, one) in enumerate(files)
        ]
        family.alter = _merging(held, options.loras)
        family.altered = _names(files, held)
    if options.training_adapter is not None:
        beneath = hashlib.sha256(_read_file(options.training_adapter, _UNDER)).hexdigest()[:16]
        family.altered = {**family.altered, "training adapter": beneath}  # of the fingerprint alone
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


def _merging(fits: Sequence[Fitted], loras: Sequence[BaseLora]) -> Callable[[str, nn.Module], None]:
    def merge(component: str, model: nn.Module) -> None:
        for modules, one in zip(fits, loras, strict=True):
            merge_lora(component, model, modules, one.strength)

    return merge


def _names(files: Sequence[tuple[bytes, BaseLora]], fits: Sequence[Fitted]) -> dict[str, str]:
    """What names the models that the files change, by component: all that is merged, in order."""
    merged: dict[str, list[tuple[str, float]]] = {}
    for (data, one), modules in zip(files, fits, strict=True):
        for component in sorted(file_parts(modules)):
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


def _fitted(data: bytes, called: str, every: Sequence[Site], names: Names) -> Fitted:
    """What a file has for the base's layers."""
    file = _adapter(data, called)
    try:
        return fitted(file, every, names)
    except WeightsError as error:
        raise WeightsError(f"{called}: {error}") from error


@dataclass(frozen=True)
class Adapted:
    """The models that training runs, with the adapter on them.

    Attributes:
        text_encoders: by component; none where captions are cached.
        groups: what moves at one rate, as the pieces of the adapter's buffer.
        under: the frozen adapter beneath, where the job has a `family.training_adapter`.
        placed: the denoiser, where a setting moves it.
    """

    denoiser: nn.Module
    text_encoders: Models
    adapter: Adapter
    attachments: list[Attachment]
    groups: list[Group]
    under: Adapter | None = None
    placed: Placed | None = None


def words_alone(job: Job) -> tuple[Precision, Setting]:
    """What the job's words of memory say where nothing is planned: `auto` does nothing."""
    memory = job.memory
    exact = job.training.sums == "exact"
    precision = Precision(
        job.training.precision,
        base="full" if memory.base == "auto" else memory.base,
        states="full" if memory.states == "auto" else memory.states,
    )
    return precision, Setting(
        checkpointing="none" if memory.checkpointing == "auto" else memory.checkpointing,
        streamed=0.0 if memory.streaming == "auto" else float(memory.streaming),
        offload=memory.offload_inputs is True,
        micro_batch=1 if exact else memory.max_micro_batch or MICRO_BATCH,
        host_states=memory.host_states is True,
    )


def load_adapted(
    job: Job,
    family: Family,
    device: torch.device,
    *,
    precision: Precision | None = None,
    fitting: Fitting | None = None,
    host: HostMemory | None = None,
    fresh: Callable[[Sequence[Site]], dict[str, Arrays]] | None = None,
) -> Adapted:
    """The denoiser, the text encoders where they are trained, and a new adapter on them.

    The adapter begins from the full weights, whatever they are held in.

    Args:
        precision: of the run; None is what the job's words say.
        fitting: what is done to fit, which is then in charge of the models; None likewise.
        host: where weights lie that are streamed.
        fresh: what sites begin from; None is what `training.seed` draws.

    Raises:
        WeightsError: `network.initial` does not fit.
    """
    said, setting = words_alone(job)
    precision, fitting = precision or said, fitting or Fitting(setting)
    dtype, exact = PRECISIONS[job.training.precision]
    options, network = job.network, get_network(job.network.kind)
    placed = precision.base != "full" or fitting.does_more or device.type not in ("cpu", "meta")
    first_device = torch.device("cpu") if placed else device
    denoiser = family.load_denoiser(dtype=dtype, device=first_device)
    if job.memory.compile and device.type != "meta":
        compile_units(family.units(denoiser))
    encoders: Models = {}
    if options.trains_text:
        encoders = family.load_text_encoders(dtype=dtype, device=first_device)
    models = {family.component: denoiser, **encoders}
    weight_of = weights_in(models)
    first = _first(
        job,
        family,
        _sites(job, family, denoiser, encoders),
        fresh or partial(first_weights, network, options, seed=job.seed, weight_of=weight_of),
    )
    constants = {site.name: network.constants(options, site) for site in first.sites}
    groups = make_groups(
        job.optimizer,
        first.sites,
        lambda site: [
            word for word in first.weights[site.name] if word not in constants[site.name]
        ],
        job.training.images_per_step,
        family.blocks,
        fast=network.fast,
        ends=family.block_ends,
    )
    adapter = Adapter(
        network,
        first.sites,
        first.weights,
        first.scales,
        dtype=exact,
        device=device,
        groups=[group.members for group in groups],
        constants=constants,
    )
    unit = network.unit(options)
    if options.dropout or options.rank_dropout or options.module_dropout or unit:
        adapter.dropout = Dropout(options, seed=job.seed, unit=unit)
    moved: Placed | None = None
    if placed:
        units = family.units(denoiser)
        moved = Placed(denoiser, units, device=device, host=host, base=precision.base)
        fitting.take([moved, *_resident(family, encoders, device)])
    under = _under(job, family, denoiser, device)
    attachments = [
        Attachment(model, component, adapter, under=under if model is denoiser else None)
        for component, model in models.items()
    ]
    return Adapted(denoiser, encoders, adapter, attachments, groups, under, moved)


class _Resident:
    """A text encoder in training: computed again as the setting says, and never streamed."""

    def __init__(self, placed: Placed) -> None:
        self._placed = placed

    def apply(self, setting: Setting) -> None:
        """All but what is the denoiser's."""
        self._placed.apply(setting.but(streamed=0.0))


def _resident(family: Family, encoders: Models, device: torch.device) -> list[Fits]:
    units = family.text_units(encoders) if encoders else {}
    return [_Resident(Placed(encoders[one], units[one], device=device)) for one in encoders]


def _under(job: Job, family: Family, denoiser: nn.Module, device: torch.device) -> Adapter | None:
    """The adapter beneath the trained one; not on the denoiser yet, which may be a skeleton."""
    url = job.family.training_adapter
    if url is None:
        return None
    called, (_, exact) = f"{_UNDER} {url}", PRECISIONS[job.training.precision]
    data = _read_file(url, _UNDER)
    found = _fitted(data, called, all_sites(family), names_of(family))
    others = [name for name in found if not name.startswith(f"{family.component}.")]
    if others:
        raise WeightsError(
            f"{called}: it has {len(others)} layers of text encoders, {some_of(others, _NAMED)}, "
            f"and a training adapter is of the {family.component} alone. Give one without them, or "
            "merge the file with family.loras."
        )
    try:
        file, sites = _adapter(data, called), family.sites(denoiser)
        return frozen_adapter(file, sites, family.place, dtype=exact, device=device)
    except WeightsError as error:
        raise WeightsError(f"{called}: {error}") from error


def files_fit(job: Job, family: Family) -> None:
    """Try the layers and the LoRA files that the job names on the base, without its weights.

    Raises:
        WeightsError: a file is for another base, or has what the job does not train.
        OptionError: no layer is left to train, or the network cannot sit on one.
    """
    denoiser, encoders = family.skeletons()
    for component, model in {family.component: denoiser, **encoders}.items():
        family.alter(component, model)
    # Some networks begin from the frozen weights, and nobody asks here what a layer begins from.
    _first(
        job,
        family,
        _sites(job, family, denoiser, encoders),
        lambda sites: {site.name: {} for site in sites},
    )
    _under(job, family, denoiser, torch.device("cpu"))


def _sites(job: Job, family: Family, denoiser: nn.Module, encoders: Models) -> list[Site]:
    """Which layers carry the adapter."""
    options, sites = job.network, []
    if options.trains_denoiser:
        sites += family.sites(denoiser)
    if options.trains_text:
        sites += family.text_sites(encoders)
    chosen = chosen_sites(
        options,
        sites,
        convolutions=options.convolutions,
        blocks=family.blocks,
        ends=family.block_ends,
    )
    fitting = _fitting(get_network(options.kind), options, chosen)
    trained = trained_sites(job.optimizer, fitting, family.blocks, ends=family.block_ends)
    if not options.initial_ranks:
        refuse_idle(options, trained)
    return trained


def _fitting(network: Network, options: NetworkOptions, sites: Sequence[Site]) -> list[Site]:
    """Those that the network can sit on; norms are left out by networks that are not for them."""
    wrong = {site.name: network.fits(options, site) for site in sites}
    refused = [site.name for site in sites if wrong[site.name] and site.kind != "norm"]
    if refused:
        raise OptionError(
            f"network.kind {options.kind} cannot sit on {len(refused)} of the layers that "
            f"network.layers chooses, {some_of(refused, _NAMED)}: {wrong[refused[0]]}. Leave them "
            "out of network.layers, or choose another kind."
        )
    kept = [site for site in sites if not wrong[site.name]]
    if sites and not kept:
        raise OptionError(
            f"network.layers chooses norms alone, and network.kind {options.kind} is not for them. "
            "Choose other layers."
        )
    return kept


def _first(
    job: Job,
    family: Family,
    sites: Sequence[Site],
    fresh: Callable[[Sequence[Site]], dict[str, Arrays]],
) -> Initial:
    """What the sites start from, fresh or from a file."""
    options = job.network
    if options.initial is None:
        scales = {site.name: options.scale_at(site) for site in sites}
        return Initial(list(sites), dict(fresh(sites)), scales)
    return initial_weights(
        _adapter(
            _read_file(options.initial, "network.initial"), f"network.initial {options.initial}"
        ),
        sites,
        options,
        lambda site: fresh([site])[site.name],
        names_of(family),
        all_sites(family),
    )
