"""Try a job with other values: a sweep on a Ray cluster, best first. The same command resumes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from raylora.base.errors import UserError
from raylora.base.storage import open_storage
from raylora.campaign import Campaign, best_job, finished_leaderboard, load_campaign
from raylora.cli_options import json_option, set_option
from raylora.terminal import console


@click.command("tune")
@click.argument("space")
@click.option("--job", metavar="FILE", help="Vary this job in place of the one the space names.")
@click.option(
    "--apply",
    type=click.Choice(["best"]),
    help="Run nothing: write the job file with the winner's values in it.",
)
@click.option("--output", metavar="FILE", help="Where --apply writes; standard output otherwise.")
@set_option
@json_option
def command(
    space: str,
    job: str | None,
    apply: str | None,
    output: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> dict[str, Any]:
    """Try a job with the values of SPACE, a search space file; prints the leaderboard."""
    if output and not apply:
        raise UserError("--output is where --apply best writes. Add --apply best.")
    campaign = load_campaign(space, overrides, job=job)
    if apply:
        return _write_job(best_job(campaign, overrides), output, quiet=as_json)
    board = finished_leaderboard(campaign) or _on_ray(campaign)
    _show(board, campaign)
    varied = ["--job", job] if job else []
    again = shlex.join([space, *varied, *(word for one in overrides for word in ("--set", one))])
    console.print(
        f"next   raylora tune {again} --apply best --output best.yaml; raylora train best.yaml",
        soft_wrap=True,
    )
    return board


def _on_ray(campaign: Campaign) -> dict[str, Any]:
    from raylora.on_ray.resources import connect

    connect(campaign.trials[0].job.fleet)
    from raylora.on_ray.tune import run_campaign

    return run_campaign(campaign)


def _write_job(text: str, output: str | None, *, quiet: bool) -> dict[str, Any]:
    if output:
        Path(output).write_text(text)
        console.print(f"next: raylora train {output}")
    elif not quiet:
        click.echo(text, nl=False)
    return {"job": text, "file": output}


def _show(board: dict[str, Any], campaign: Campaign) -> None:
    """The leaderboard, best first."""
    again = ", was finished already" if board.get("already_done") else ""
    paths = list(campaign.options.space)
    store = open_storage(campaign.job.store).url
    console.print(f"{board['campaign']}: {board['metric']}, best first{again}", style="bold")
    table = Table(box=SIMPLE_HEAD)
    for path in paths:
        table.add_column(path.rpartition(".")[2])
    table.add_column("loss")
    table.add_column("steps")
    table.add_column(f"LoRA, below {store.removeprefix('file://')}", overflow="fold")
    for row in board["trials"]:
        loss = "-" if row["validation"] is None else f"{row['validation']:.4f}"
        steps = f"{row['steps']}" + ("" if row["state"] == "finished" else f" {row['state']}")
        adapter = (row["adapter"] or row["error"] or "-").removeprefix(f"{store}/")
        table.add_row(*(f"{row['values'][path]}" for path in paths), loss, steps, adapter)
    console.print(table)
    if proof := board["proof"]:
        console.print(
            f"proof  diffusers reads {proof['trial']} as it was trained, {proof['modules']} "
            f"modules, worst error {proof['worst_error']:.1e}",
            soft_wrap=True,
        )
