"""A job's models, adapter, loss and step on the meta device, each run once and looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from raylora.base.site import Site
from raylora.base.unit import Unit
from raylora.components.vae import decode_in_tiles, decode_whole, load_vae
from raylora.data.supply import DROPPED, GEOMETRY
from raylora.diffusion.losses import make_loss
from raylora.diffusion.noise import trained_process
from raylora.diffusion.process import Flow
from raylora.families import Family, Models, get_family
from raylora.job import Job, with_overrides
from raylora.memory.checkpoint import recomputed_units
from raylora.memory.emulate import Kernels, kernels_of
from raylora.memory.footprint import IMAGES, RANK, Measured, Meter, measure, measure_model
from raylora.memory.placed import Placed
from raylora.memory.setting import CHECKPOINTINGS, Checkpointing, Precision, Setting
from raylora.memory.table import Entry, Moments
from raylora.memory.tracker import PeakTracker
from raylora.models import PRECISIONS, Adapted, load_adapted
from raylora.networks import Arrays, Network, NetworkOptions, Weight, get_network
from raylora.training.fitting import Fitting
from raylora.training.parts import Parts
from raylora.training.step import losses_at
from raylora.weights.base import Base
from raylora.weights.short_names import SHORT_NAMES
from raylora.weights.weightless import WeightlessBase, true_size

_META = torch.device("meta")
_PRIMES = (47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127, 131, IMAGES)


def table_entry(
    word: str,
    bucket: tuple[int, int],
    precision: str,
    kinds: Sequence[Checkpointing] = CHECKPOINTINGS,
) -> Entry:
    """An entry of the table, measured anew; `kinds` of checkpointing alone."""
    kind = SHORT_NAMES[word].kind
    job = Job.model_validate(
        {
            "name": word,
            "family": {"kind": kind, "weights": word},
            "network": {"rank": RANK},
            "data": {"folder": "."},
            "training": {"steps": 1, "seed": 0, "precision": precision},
        }
    )
    family = get_family(kind)[0](true_size(word), job.family)
    return measured_entry(job, family, bucket, rank=RANK, kinds=kinds)


def measured_entry(
    job: Job,
    family: Family,
    bucket: tuple[int, int],
    *,
    kernels: Kernels = "cuda",
    rank: int | None = None,
    kinds: Sequence[Checkpointing] = CHECKPOINTINGS,
) -> Entry:
    """Run all that a job does once on the meta device.

    Args:
        kernels: of which kind of device.
        rank: of the job's network, a large prime, where the entry is to be for any rank.
        kinds: of checkpointing.
    """
    shown = _on_meta(family, job)
    encoders = shown.load_text_encoders(dtype=torch.float32, device=_META)
    tokens = _tokens(shown)
    conditions, read_text = _read(shown, encoders, tokens, kernels)
    vae = load_vae(shown.base, dtype=torch.float32, device=_META)
    models = _adapted(job, shown)
    trains_text = bool(models.text_encoders)
    batch = _batch(job, shown, tokens if trains_text else conditions, bucket)
    steps, predict = _steps(job, shown, models, batch, kernels, rank, kinds)
    adapter = models.adapter
    numbers = adapter.values.numel()
    text_units = shown.text_units(encoders)
    return Entry(
        denoiser=measure_model(models.denoiser, shown.units(models.denoiser)),
        text_encoders={
            one: measure_model(model, text_units[one]) for one, model in encoders.items()
        },
        vae=measure_model(vae, ()).numbers,
        bucket=bucket,
        arithmetic=job.training.precision,
        steps=steps,
        predict=predict,
        **_vae_moments(shown, vae, bucket, kernels),
        read_text=read_text,
        adapter_numbers=(numbers, 0) if rank is None else (0, numbers // rank),
        adapter_constants=adapter.constants.numel(),
        trains_text=tuple(models.text_encoders),
    )


class _Shapes(WeightlessBase):
    """A base whose weights are shapes on the meta device, and whose tokenizers know no word."""

    def __init__(self, base: Base, models: Mapping[str, nn.Module]) -> None:
        super().__init__(base.name, {})
        self._base, self._models = base, models

    def has(self, component: str) -> bool:
        return self._base.has(component)

    def config(self, component: str) -> dict[str, Any]:
        return self._base.config(component)

    def weights(self, component: str) -> dict[str, Tensor]:
        return dict(self._models[component].state_dict())

    def tokenizer(self, component: str) -> Any:
        return _Blank()


class _Blank:
    """Stands for a tokenizer where only the number of tokens counts."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __call__(self, texts: Sequence[str], *, max_length: int = 0, **words: Any) -> _Blank:
        self.input_ids = [[0] * max_length for _ in texts]
        self.attention_mask = [[1] * max_length for _ in texts]
        return self


def _on_meta(family: Family, job: Job) -> Family:
    """The same family, of models without weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    denoiser, encoders = family.skeletons()
    with _META:
        vae: nn.Module = AutoencoderKL.from_config(family.base.config("vae"))
    models = {family.component: denoiser, "vae": vae, **encoders}
    return type(family)(_Shapes(family.base, models), job.family)


def _adapted(job: Job, family: Family) -> Adapted:
    precision = Precision(job.training.precision)
    plain = with_overrides(job, {"memory": {}})
    network = get_network(job.network.kind)
    fresh = _by_form(network, job.network)
    return load_adapted(
        plain, family, _META, precision=precision, fitting=Fitting(Setting()), fresh=fresh
    )


def _by_form(
    network: Network, options: NetworkOptions
) -> Callable[[Sequence[Site]], dict[str, Arrays]]:
    """First weights that sites of one form share, since only their shapes are asked for."""
    held: dict[Any, Arrays] = {}

    def fresh(sites: Sequence[Site]) -> dict[str, Arrays]:
        found = {}
        for site in sites:
            form = (site.kind, site.inputs, site.outputs, site.kernel, options.form_at(site))
            if form not in held:
                held[form] = network.initial(options, site, np.zeros, _blank_weight(site))
            found[site.name] = held[form]
        return found

    return fresh


def _blank_weight(site: Site) -> Weight:
    kernel = site.kernel if site.kind == "conv" else ()
    shape = (site.outputs,) if site.kind == "norm" else (site.outputs, site.inputs, *kernel)
    return lambda: np.broadcast_to(np.float64(1), shape)  # a large one takes no memory


def _host(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of the host, from where the step brings it to the device; one sample's memory."""
    return torch.zeros(1, *shape[1:], dtype=dtype).expand(shape)


def _tokens(family: Family) -> dict[str, Tensor]:
    """A batch of captions as the loader gives it."""
    return {
        name: _host(IMAGES, *held.shape[1:], dtype=torch.from_numpy(held).dtype)
        for name, held in family.tokens([""]).items()
    }


def _read(
    family: Family, encoders: Models, tokens: Mapping[str, Tensor], kernels: Kernels
) -> tuple[dict[str, Tensor], dict[str, Moments]]:
    """What the denoiser is given of captions, as the cache has it, and what each encoder needs."""
    tracker = Meter(IMAGES)
    moments: dict[str, Moments] = {}
    with kernels_of(kernels), tracker, torch.no_grad():
        for one, encoder in encoders.items():
            _watch(tracker, encoder, one, moments)
        read = family.read_tokens(encoders, tokens)
    return {name: _host(*held.shape) for name, held in read.items()}, moments


def _watch(
    tracker: PeakTracker, encoder: nn.Module, name: str, moments: dict[str, Moments]
) -> None:
    tracker.add((*encoder.parameters(), *encoder.buffers()))

    def done(*_: Any) -> None:
        moments[name] = tracker.moments()

    encoder.register_forward_pre_hook(lambda *_: tracker.begin())
    encoder.register_forward_hook(done)


def _batch(
    job: Job, family: Family, captions: Mapping[str, Tensor], bucket: tuple[int, int]
) -> dict[str, Tensor]:
    """A batch as the loader gives it."""
    width, height = (side // family.pixels_per_latent for side in bucket)
    batch = {"latents": _host(IMAGES, family.latent_channels, height, width), **captions}
    if family.wants_geometry:
        batch[GEOMETRY] = _host(IMAGES, 6)
    if any(family.encoder_dropout):
        batch[DROPPED] = _host(IMAGES, len(family.encoder_dropout))
    if any(options.masked for options in job.sets):
        batch["mask"] = _host(IMAGES, 1, height, width)
    return batch


def blank_batch(
    job: Job, family: Family, bucket: tuple[int, int], images: int
) -> dict[str, Tensor]:
    """A micro-batch as the loader gives it, of zeros: what a step computes does not hang on them.

    Loads no weights and no tokenizers.
    """
    shown = _on_meta(family, job)
    found = tokens = _tokens(shown)
    if not job.network.trains_text:
        encoders = shown.load_text_encoders(dtype=torch.float32, device=_META)
        with torch.no_grad():
            found = shown.read_tokens(
                encoders, {name: t[:1].to(_META) for name, t in tokens.items()}
            )
    shapes = {name: _host(IMAGES, *one.shape[1:], dtype=one.dtype) for name, one in found.items()}
    whole = _batch(job, shown, shapes, bucket)
    return {name: held[:images].contiguous() for name, held in whole.items()}


@dataclass(frozen=True)
class _Step:
    """The part of `Parts` that a loss asks for."""

    denoiser: nn.Module
    adapter: Any
    predict: Any
    read_text: Any
    process: Any
    loss: Any
    dtype: torch.dtype
    device: torch.device


def _losses_of(
    job: Job, family: Family, models: Adapted, batch: Mapping[str, Tensor], device: torch.device
) -> Callable[[], Tensor]:
    """Gives the sum of a batch's losses, as a step takes it."""
    dtype, _ = PRECISIONS[job.training.precision]
    encoders = models.text_encoders
    process = trained_process(family.process, job.noise)

    def read_text(texts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if encoders:
            return family.read_tokens(encoders, texts)
        return {name: held.to(device, dtype) for name, held in texts.items()}

    parts = _Step(
        denoiser=models.denoiser,
        adapter=models.adapter,
        predict=family.predict,
        read_text=read_text,
        process=process,
        loss=make_loss(job.loss, process, masked="mask" in batch),
        dtype=dtype,
        device=device,
    )
    noise = _host(*batch["latents"].shape)
    kind = torch.float32 if isinstance(process, Flow) else torch.int64
    timesteps = _host(len(noise), dtype=kind)
    return lambda: losses_at(cast("Parts", parts), batch, noise, timesteps).sum()


def _steps(
    job: Job,
    family: Family,
    models: Adapted,
    batch: Mapping[str, Tensor],
    kernels: Kernels,
    rank: int | None,
    kinds: Sequence[Checkpointing],
) -> tuple[dict[Checkpointing, Measured], Measured]:
    """A step with each kind of checkpointing, and a loss without gradients."""
    adapter, images = models.adapter, IMAGES
    if adapter.dropout is not None:  # draws for each sample
        images = _few(models, batch)
        batch = {word: held[:images] for word, held in batch.items()}
    losses = _losses_of(job, family, models, batch, _META)

    def predict() -> None:
        with torch.no_grad():
            losses()

    dtype, _ = PRECISIONS[job.training.precision]

    def train() -> None:
        adapter.forget_rounded()  # the first pass makes its copy, which then stays
        # Of any rank: the one that stands for all would have too many numbers.
        rounded = adapter.rounded_to(dtype, always=rank is not None)
        with adapter.dropping(0, range(images)), rounded:
            losses().backward()

    held = _tensors([models.denoiser, *models.text_encoders.values()])
    for worn in (adapter, models.under):
        held += [] if worn is None else [worn.values, worn.gradients, worn.constants]

    def measured(step: Callable[[], object], modules: Sequence[nn.Module] = ()) -> Measured:
        return measure(
            step,
            held=held,
            modules=modules,
            rank=rank,
            kernels=kernels,
            attention=job.memory.attention != "math",
            images=images,
        )

    found = measured(predict)
    steps: dict[Checkpointing, Measured] = {}
    with _placed(family, models) as (placed, units):
        for kind in kinds:
            for one in placed:
                one.apply(Setting(checkpointing=kind))
            steps[kind] = measured(train, _again(units, kind))
    return steps, found


def _few(models: Adapted, batch: Mapping[str, Tensor]) -> int:
    """A prime that no size of models, adapter or batch is a multiple of, and not a large one."""
    leaves = [leaf for site in models.adapter.parameters.values() for leaf in site.values()]
    held = [*_tensors([models.denoiser, *models.text_encoders.values()]), *leaves]
    sizes = {side for one in held for side in one.shape}
    sizes |= {side for one in batch.values() for side in one.shape[1:]}
    return next(one for one in _PRIMES if all(side % one for side in sizes if side))


@contextmanager
def _placed(family: Family, models: Adapted) -> Iterator[tuple[list[Placed], list[list[Unit]]]]:
    """What sets the checkpointing of all that is trained, and the units of each."""
    encoders = models.text_encoders
    texts = family.text_units(encoders) if encoders else {}
    every = [(models.denoiser, family.units(models.denoiser))]
    every += [(encoders[one], texts[one]) for one in encoders]
    placed = [Placed(model, units, device=_META) for model, units in every]
    try:
        yield placed, [units for _, units in every]
    finally:
        for one in placed:
            one.close()


def _again(every: Sequence[Sequence[Unit]], kind: Checkpointing) -> list[nn.Module]:
    """What is computed again, and so keeps its inputs."""
    if kind == "mlp":
        return [part for units in every for unit in units for part in unit.mlp]
    return [units[i].module for units in every for i in recomputed_units(units, kind)]


def _tensors(models: Sequence[nn.Module]) -> list[Tensor]:
    return [one for model in models for one in (*model.parameters(), *model.buffers())]


def _vae_moments(
    family: Family, vae: Any, bucket: tuple[int, int], kernels: Kernels
) -> dict[str, Moments]:
    """What encoding and decoding pictures needs."""
    width, height = bucket
    side = family.pixels_per_latent
    latents = (family.latent_channels, height // side, width // side)

    def moments(work: Callable[[Tensor], object], images: int, *shape: int) -> Moments:
        def step() -> object:
            with torch.no_grad():
                return work(_host(images, *shape).to(_META))

        return measure(step, held=_tensors([vae]), images=images, kernels=kernels).moments

    return {
        "encode": moments(lambda x: vae.encode(x).latent_dist.mode(), IMAGES, 3, height, width),
        "decode": moments(lambda x: decode_whole(vae, x), IMAGES, *latents),
        # They are decoded one after the other.
        "decode_tiled": moments(lambda x: decode_in_tiles(vae, x), 1, *latents),
    }
