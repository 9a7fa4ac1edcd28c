"""A store's runs, ready to draw: which base a request means, and that base in memory."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from raylora.base.errors import DataError, OptionError
from raylora.base.log import get_logger
from raylora.base.storage import Storage
from raylora.diffusion.noise import trained_process
from raylora.job import Job, job_from
from raylora.models import PRECISIONS, open_family
from raylora.preview.options import usual_of
from raylora.serving.library import Checkpoint, Library, Recent
from raylora.serving.options import RenderRequest, ServeOptions, picture_settings
from raylora.serving.studio import Studio

log = get_logger("serve")

NO_ADAPTER = "base"


@dataclass(frozen=True)
class Picture:
    """What was drawn, and with what.

    Attributes:
        name, hash: of the checkpoint, or "base".
    """

    png: bytes
    name: str
    hash: str
    seed: int
    seconds: float


class Gallery:
    """Draws requests with the base that each one's run was trained on; one base at a time.

    Not for two threads at once.
    """

    def __init__(self, store: Storage, options: ServeOptions, device: torch.device) -> None:
        self._library = Library(store)
        self._options = options
        self._device = device
        self._studios: Recent[Studio] = Recent(1)
        if options.base is not None:
            self._studio(job_from(self._library.job(options.base)))

    def draw(self, request: RenderRequest, run: str, checkpoint: Checkpoint | None) -> Picture:
        """Draw a request as `choose` understood it.

        Raises:
            UserError: the request asks too much, or the run's base or adapter cannot be used.
        """
        started = time.perf_counter()
        job = job_from(self._library.job(run))
        studio = self._studio(job)
        process = trained_process(studio.family.process, job.noise)
        settings = picture_settings(
            request,
            job.preview.with_usual(usual_of(studio.family, job.family)),
            self._options,
            size_step=studio.family.size_step,
            process=process,
        )
        png = studio.draw(self._library, checkpoint, settings, process=process)
        seconds = time.perf_counter() - started
        name, hash_ = (checkpoint.name, checkpoint.hash) if checkpoint else (NO_ADAPTER,) * 2
        log.info("%s %dx%d  %.2f s", name, settings.width, settings.height, seconds)
        return Picture(png, name, hash_, settings.seed, seconds)

    def _studio(self, job: Job) -> Studio:
        """The job's base; the one before leaves first, since two may not fit."""
        return self._studios.get(base_key(job.plain()), lambda: self._load(job))

    def _load(self, job: Job) -> Studio:
        dtype, exact = PRECISIONS[job.training.precision]
        return Studio(
            open_family(job),
            dtype=dtype,
            exact=exact,
            device=self._device,
            adapters_held=self._options.adapters_held,
        )


def choose(
    library: Library, options: ServeOptions, request: RenderRequest
) -> tuple[str, Checkpoint | None]:
    """The run whose base draws a request, and the checkpoint (None: the base alone).

    Raises:
        MissingObject: no such adapter.
        OptionError: no adapter, and no telling which base.
    """
    if request.adapter is not None:
        checkpoint = library.find(request.adapter)
        return checkpoint.run, checkpoint
    if options.base is None:
        raise OptionError(
            "adapter is null, and the store's runs have several bases. Name a run with strength 0, "
            "or start the server with --set base=RUN."
        )
    return options.base, None


def with_base(library: Library, options: ServeOptions) -> ServeOptions:
    """The options with `base` filled in, where the store's runs have one base only.

    Raises:
        UserError: no runs, no such run, or a base that cannot be opened; found before a cluster is
            started for it.
    """
    runs = library.runs()
    if not runs:
        raise DataError(
            "The store holds no runs (looked for runs/<name>/job.yaml). Give the `store` of a "
            "training job, or train one."
        )
    if options.base is not None:
        runs = [library.find(options.base).run]
    bases: dict[str, str] = {}
    for run in runs:
        bases.setdefault(base_key(library.job(run)), run)
    if len(bases) > 1:
        log.warning("the runs have %d bases; changing between them takes seconds", len(bases))
        return options
    (run,) = bases.values()
    open_family(job_from(library.job(run)))
    return options.model_copy(update={"base": run})


def base_key(job: Mapping[str, Any]) -> str:
    """Names a base as it is loaded, from a job as plain data: kind, weights and precision."""
    return json.dumps([job["family"], job["training"]["precision"]], sort_keys=True)


def catalogue(library: Library) -> list[dict[str, Any]]:
    """Every complete checkpoint of every run, as plain data."""
    return [
        {
            "adapter": checkpoint.name,
            "run": run,
            "step": checkpoint.step,
            "hash": checkpoint.hash,
            "trained_steps": checkpoint.step,
            "total_steps": job["training"]["steps"],
            "base": job["family"]["weights"],
        }
        for run in library.runs()
        for job in [library.job(run)]
        for checkpoint in library.checkpoints(run)
    ]


def example(library: Library, options: ServeOptions) -> dict[str, Any]:
    """A request that works, for people to try."""
    run = options.base or library.runs()[0]
    pictures = job_from(library.job(run)).preview.pictures()
    prompt = pictures[0].prompt if pictures else "a red heart"
    adapter = run if library.checkpoints(run) else None
    return {"prompt": prompt, "adapter": adapter, "seed": 1}
