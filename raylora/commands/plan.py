"""Say what fits on which card, how fast and at what price, and why; without any GPU."""

from __future__ import annotations

from typing import Any

import click
import torch

from raylora.cli_options import json_option, set_option
from raylora.forecast import plan
from raylora.job import Job, load_job
from raylora.terminal import show_plan


@click.command("plan")
@click.argument("job")
@click.option(
    "--gpu",
    "gpus",
    metavar="CARD,...",
    help="The workers' cards, e.g. RTX3060-12G,2xA100-80G; else the kinds that fleet.workers "
    "names, else this machine's.",
)
@click.option("--each", is_flag=True, help="Plan every card by itself, not all as one fleet.")
@click.option(
    "--host-gib",
    type=click.FloatRange(min=0, min_open=True),
    help="Free host memory beside each card that is not here, in GiB; 32 where not given.",
)
@click.option(
    "--prices",
    metavar="FILE",
    help="A YAML file of dollars an hour, e.g. `RTX4090: 0.34`, over the defaults.",
)
@click.option(
    "--measure/--no-measure",
    default=None,
    help="Take two real steps on this machine too, which needs the base and no images; usual where "
    "a GPU is here and no --gpu is given.",
)
@set_option
@json_option
def command(
    job: str,
    gpus: str | None,
    each: bool,
    host_gib: float | None,
    prices: str | None,
    measure: bool | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> dict[str, Any]:
    """Plan JOB, a YAML file: what each card holds and streams, its peaks, seconds and dollars.

    Without --measure everything is predicted, and nothing is downloaded. Images are counted where
    they are there.
    """
    read = load_job(job, overrides)
    document = plan(read, gpus, each=each, host_gib=host_gib, prices=prices)
    if measure or (measure is None and gpus is None and _has_gpu(read)):
        from raylora.rehearse import rehearse

        width, height = document["bucket"]
        document["measured"] = rehearse(read, (width, height))
    if not as_json:
        show_plan(document)
    return document


def _has_gpu(job: Job) -> bool:
    return torch.cuda.is_available() and not job.fleet.cpus_only
