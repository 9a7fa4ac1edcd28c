"""What a job needs: its own step and its own models, run without weights on the meta device."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from raylora.families import Family, get_family
from raylora.job import Job
from raylora.measure.on_meta import measured_entry
from raylora.memory.emulate import Kernels
from raylora.memory.need import Need
from raylora.memory.plan import Asked
from raylora.memory.table import cached, in_table, keep
from raylora.models import open_family
from raylora.networks import get_network
from raylora.optim.states import eight_bit_twin, state_bytes
from raylora.training.memory_problems import graph_obstacles
from raylora.weights.short_names import SHORT_NAMES
from raylora.weights.true_configs import true_configs
from raylora.weights.weightless import true_size

_PASSED_OVER = {"architectures", "torch_dtype", "dtype", "transformers_version", "sample_size"}
"""Words of configs that nothing hangs on here, as do those that begin with `_`."""
_SAME_NEED = {"kind", "weights", "vae", "parts", "loras", "guidance", "weighted_captions"}
"""Options of a family that change no size."""


def planning_family(job: Job) -> Family:
    """The job's family to be measured: of a usual base by its configs alone, which raylora has."""
    options = job.family
    known = SHORT_NAMES.get(options.weights)
    if known is None or known.kind != options.layout or "config" in options.parts:
        return open_family(job)
    return get_family(options.kind)[0](true_size(options.weights), options)


def asked_of_job(job: Job) -> Asked:
    """What a job asks of its workers besides its models."""
    training, memory, optimizer = job.training, job.memory, job.optimizer
    twin = eight_bit_twin(optimizer.name)
    wide = 2 if training.precision == "fp64" else 1
    small = None if twin is None else optimizer.model_copy(update={"name": twin, "args": {}})
    return Asked(
        images_per_step=training.images_per_step,
        options=memory,
        arithmetic=training.precision,
        state_bytes=state_bytes(optimizer) * wide,
        state_bytes_8bit=None if small is None else state_bytes(small),
        ema=job.ema.decay is not None and job.ema.place == "device",
        exact_sums=training.sums == "exact",
        previews=bool(job.preview.prompts),
        live_encoders=job.data.pictures_live or job.data.texts_live,
        fused=memory.fused,
        bnb=importlib.util.find_spec("bitsandbytes") is not None,
        recorded=is_recorded(job),
    )


def is_recorded(job: Job) -> bool:
    """Whether micro-batches are recorded where there is a GPU: the word of `memory.cuda_graphs` is
    for it, and nothing of the job stands against it."""
    wanted = job.memory.cuda_graphs
    if wanted == "auto":
        family, _ = get_family(job.family.kind)
        wanted = family.recorded and get_network(job.network.kind).low_rank
    memory, training, network = job.memory, job.training, job.network
    return wanted and not any(graph_obstacles(memory, training, network, preserved=job.preserves))


def need_of_job(
    job: Job,
    family: Family,
    bucket: tuple[int, int],
    *,
    kernels: Kernels = "cuda",
    table: bool = True,
    cache: bool = True,
) -> Need:
    """What a job needs at a bucket, (width, height) in pixels.

    Args:
        family: of `planning_family`, or the opened one.
        kernels: of which kind of device it is.
        table: take it from what comes with raylora, where the job's is there.
        cache: take it from what this machine has measured before, or else remember it there.
    """
    if table and kernels == "cuda" and (word := _usual(job, family)) is not None:
        found = in_table(word, bucket, job.training.precision)
        if found is not None:
            return found.at(job.network.rank)
    facts = {**_facts(job, family, bucket), "kernels": kernels}
    # A file may be another one tomorrow.
    cache = cache and job.network.initial is None and job.family.training_adapter is None
    entry = cached(facts) if cache else None
    if entry is None:
        entry = measured_entry(job, family, bucket, kernels=kernels)
        if cache:
            keep(facts, entry)
    return entry.at()


def _usual(job: Job, family: Family) -> str | None:
    """The short name of the base that a job trains as the table has it; None where it does not."""
    network, usual = job.network, get_network("lora").options()
    plain = network.model_copy(update={"rank": usual.rank, "alpha": None, "max_norm": None})
    sized = {
        word: getattr(job.family, word)
        for word in type(job.family).model_fields
        if word not in _SAME_NEED
    }
    fields = type(job.family).model_fields
    if (
        plain != usual
        or any(value != fields[word].default for word, value in sized.items())
        or job.memory.attention == "math"
        or job.optimizer.block_rates != type(job.optimizer.block_rates)()
        or 0 in (job.optimizer.denoiser_rate, *job.optimizer.rates.values())
    ):
        return None
    names = (name for name, known in SHORT_NAMES.items() if known.kind == job.family.layout)
    return next((name for name in names if _is(family, name)), None)


def _is(family: Family, name: str) -> bool:
    """Whether a family's models have the sizes of a usual base."""
    known = true_configs(name)
    components = (family.component, "vae", *family.text_components)
    return all(
        component in known and _sizes(family.base.config(component)) == _sizes(known[component])
        for component in components
    )


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        word: list(value) if isinstance(value, tuple) else value
        for word, value in config.items()
        if not word.startswith("_") and word not in _PASSED_OVER and value is not None
    }


def _facts(job: Job, family: Family, bucket: tuple[int, int]) -> dict[str, Any]:
    """What the need of a job hangs on."""
    components = (family.component, "vae", *family.text_components)
    plain = job.plain()
    return {
        "configs": {one: family.base.config(one) for one in components},
        "bucket": list(bucket),
        "precision": job.training.precision,
        "math": job.memory.attention == "math",
        **{word: plain[word] for word in ("family", "network", "optimizer", "loss", "noise")},
        "masked": [options.masked for options in job.sets],
    }
