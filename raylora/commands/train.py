"""Train a job: on a Ray cluster, or in this process with --local. The same command resumes."""

from __future__ import annotations

from typing import Any

import click

from raylora.assemble import open_store
from raylora.check import Checked, arithmetic, check_job
from raylora.cli_options import json_option, set_option
from raylora.job import load_job
from raylora.local import train_checked
from raylora.terminal import console, progress_sink, show_arithmetic, show_result
from raylora.training.report import Sink


@click.command("train")
@click.argument("job")
@click.option("--local", is_flag=True, help="In this process, without Ray.")
@click.option("--extend", is_flag=True, help="Go on past the end of a finished run.")
@click.option("--moved", is_flag=True, help="Images or base lie elsewhere than when it began.")
@click.option("--rehash", is_flag=True, help="Read every image again, whatever its date says.")
@set_option
@json_option
def command(
    job: str,
    local: bool,
    extend: bool,
    moved: bool,
    rehash: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> dict[str, Any]:
    """Train JOB, a YAML file; prints the run's folder last."""
    read = load_job(job, overrides)
    checked = check_job(read, rehash=rehash)
    for warning in checked.warnings:
        console.print(f"warning: {warning}", style="yellow")
    show_arithmetic(arithmetic(checked))
    with progress_sink() as sink:
        if local:
            result = train_checked(checked, extend=extend, moved=moved, sinks=[sink])
        else:
            result = _on_ray(checked, extend=extend, moved=moved, sink=sink)
    folder = open_store(read).url
    show_result(result, folder)
    if not as_json:
        click.echo(folder.removeprefix("file://"))
    return {**result, "folder": folder}


def _on_ray(checked: Checked, *, extend: bool, moved: bool, sink: Sink) -> dict[str, Any]:
    from raylora.on_ray.resources import connect

    connect(checked.job.fleet)
    from raylora.on_ray.train import train_on_ray

    return train_on_ray(checked, extend=extend, moved=moved, sinks=[sink])
