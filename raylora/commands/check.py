"""Find every mistake in a job that can be found without training, and print its arithmetic."""

from __future__ import annotations

from typing import Any

import click

from raylora.check import arithmetic, check_job
from raylora.cli_options import json_option, set_option
from raylora.job import load_job
from raylora.terminal import console, show_arithmetic


@click.command("check")
@click.argument("job")
@set_option
@json_option
def command(job: str, overrides: tuple[str, ...], as_json: bool) -> dict[str, Any]:
    """Check JOB, a YAML file: options, base, images, store. Exit code 2 lists what is wrong."""
    checked = check_job(load_job(job, overrides))
    numbers = arithmetic(checked)
    for warning in checked.warnings:
        console.print(f"warning: {warning}", style="yellow")
    show_arithmetic(numbers)
    if not as_json:
        click.echo("ok")
    return {"ok": True, "warnings": checked.warnings, **numbers}
