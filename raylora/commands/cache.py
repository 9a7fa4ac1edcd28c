"""Encode a job's images and captions ahead of training: on a Ray cluster, or here with --local."""

from __future__ import annotations

from typing import Any

import click

from raylora.check import arithmetic, check_job
from raylora.cli_options import json_option, set_option
from raylora.job import load_job
from raylora.local import cache_here


@click.command("cache")
@click.argument("job")
@click.option("--local", is_flag=True, help="In this process, without Ray.")
@click.option("--rehash", is_flag=True, help="Read every image again, whatever its date says.")
@set_option
@json_option
def command(
    job: str, local: bool, rehash: bool, overrides: tuple[str, ...], as_json: bool
) -> dict[str, Any]:
    """Bring the cache of JOB, a YAML file, up to date; a second run finds nothing to do."""
    checked = check_job(load_job(job, overrides), rehash=rehash)
    missing = arithmetic(checked)["to_encode"]
    if local:
        datasets = cache_here(checked)
    else:
        from raylora.on_ray.resources import connect

        connect(checked.job.fleet)
        from raylora.on_ray.cache import prepare_on_ray

        datasets = prepare_on_ray(checked)
    bad = [one.key for one in datasets.training.bad]
    if not as_json:
        click.echo(f"{len(datasets.training.rows)} images cached in {checked.job.cache_url}")
    return {
        "images": len(datasets.training.rows),
        "encoded": missing,
        "bad": bad,
        "cache": checked.job.cache_url,
    }
