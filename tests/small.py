"""Small real jobs: the quickstart with fewer steps and nothing around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from raylora.assemble import make_run, open_store
from raylora.base.seeds import sample_number
from raylora.check import check_job
from raylora.data.rows import Row
from raylora.job import Job, load_job, with_overrides
from raylora.local import cache_here, train
from raylora.training.checkpoint import checkpoint_steps, read_checkpoint
from raylora.training.loop import Run
from raylora.training.reduce import Alone, Group

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "jobs" / "quickstart.yaml"


MakeJob = Callable[..., Job]
"""`small_job` with a store of the test's own."""


def small_job(store: str, **overrides: Any) -> Job:
    """The quickstart without previews and held-out images; `a__b=c` sets a.b."""
    bare = {
        "store": store,
        "family.weights": str(ROOT / "jobs/quickstart/tiny-sd"),
        "data.folder": str(ROOT / "jobs/quickstart/demo-data/train"),
        "validation.folder": None,
        "preview.prompts": [],
        "training.steps": 6,
        "training.images_per_step": 4,
        "training.save_every_steps": None,
        "training.sums": "fast",
        "schedule.warmup_steps": 2,
        "fleet.workers": 1,
    }
    given = {path.replace("__", "."): value for path, value in overrides.items()}
    return with_overrides(load_job(QUICKSTART), {**bare, **given})


def image_row(
    key: str,
    *,
    repeats: int = 1,
    bucket: tuple[int, int] = (64, 64),
    latents: bytes = bytes(16),
    text: bytes = bytes(16),
    caption: str = "",
    size: tuple[int, int] | None = None,
) -> Row:
    """A row with one picture and one caption."""
    return Row(
        key,
        repeats,
        bucket,
        caption,
        size or bucket,
        latents_keys=(latents,),
        text_keys=(text,),
        crops=((0, 0),),
        number=sample_number(key, 0),
    )


def train_small(job: Job) -> dict[str, Any]:
    """Train in this process, without the proof, which has tests of its own."""
    torch.set_num_threads(1)
    return train(job, prove=False)


def final_state(job: Job) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    storage = open_store(job)
    return read_checkpoint(storage, checkpoint_steps(storage)[-1]).tensors


def saved_file(job: Job) -> dict[str, torch.Tensor]:
    """Tensors of the run's LoRA file."""
    return load_tensors(open_store(job).read(f"{job.name}.safetensors"))


def open_run(job: Job, group: Group | None = None, *, report: bool = False) -> Run:
    """A run ready to be trained; `report` says whether it reports and saves. Close it."""
    checked = check_job(job)
    return make_run(
        job,
        checked.family,
        cache_here(checked),
        open_store(job),
        group or Alone(),
        torch.device("cpu"),
        prove=False,
        report=report,
    )


def first_values(job: Job, group: Group) -> torch.Tensor:
    """The adapter's numbers before the first step."""
    run = open_run(job, group)
    run.close()
    return run.parts.adapter.values.detach().clone()
