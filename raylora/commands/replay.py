"""Compute one recorded step of a run again, and show which images were in it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from raylora.assemble import make_run, open_store, pick_device
from raylora.check import check_job
from raylora.cli_options import json_option, set_option
from raylora.job import load_job
from raylora.local import cache_here
from raylora.training.reduce import Alone
from raylora.training.replay import replay_step


@click.command("replay")
@click.argument("job")
@click.option("--step", required=True, type=click.IntRange(1), help="The step, counted from 1.")
@set_option
@json_option
def command(job: str, step: int, overrides: tuple[str, ...], as_json: bool) -> dict[str, Any]:
    """Replay a step of JOB's run, from the checkpoint before it; storage stays as it is."""
    checked = check_job(load_job(job, overrides))
    run = make_run(
        checked.job,
        checked.family,
        cache_here(checked),
        open_store(checked.job),
        Alone(),
        pick_device(checked.job),
        prove=False,
        report=False,
    )
    try:
        found = replay_step(run, step)
    finally:
        run.close()
    if not as_json:
        for key in found.keys:
            click.echo(key)
        click.echo(f"step {step}: loss recorded {found.recorded!r}, replayed {found.replayed!r}")
    return asdict(found)
