"""Prove that a LoRA file means the same to diffusers as to raylora."""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from raylora.adapt.lora_file import read_adapter
from raylora.adapt.predictions import verify_predictions
from raylora.base.errors import WeightsError
from raylora.base.units import duration, mib
from raylora.cli_options import json_option, lora_file_argument


@click.command()
@lora_file_argument
@click.option(
    "--base",
    required=True,
    metavar="FOLDER",
    help="The base the LoRA is for: a local folder in diffusers layout.",
)
@json_option
def command(file: Path, base: str, as_json: bool) -> dict[str, Any]:
    """Prove that the LoRA FILE means the same to diffusers as to raylora.

    Every module's weights are compared, then whole predictions of the base: once with diffusers and
    peft loading the file, once with its weights merged by raylora. Exit code 0 only if all agree.
    """
    adapter = read_adapter(file)
    unfit = [word for word, fits in adapter.hash_checks.items() if fits is False]
    if unfit:
        raise WeightsError(
            f"{file}: {unfit[0]} does not fit the weights, so they were changed after they were "
            "saved. Take the file from where it was made."
        )
    _quieten_libraries()
    report = verify_predictions(file, base)
    hashed = [word for word, fits in adapter.hash_checks.items() if fits]
    if not as_json:
        click.echo(f"file        {file.name}, {mib(adapter.size_bytes)}, {report.modules} modules")
        fit = "fits" if len(hashed) == 1 else "fit"
        told = f"{' and '.join(hashed)} {fit}" if hashed else "none in the file"
        click.echo(f"hashes      {told}")
        click.echo(
            f"readers     diffusers and raylora read the same ΔW in {report.modules} of "
            f"{report.modules} modules (largest difference {report.reader_error:.1e})"
        )
        click.echo(
            f"prediction  diffusers with peft and merged weights differ by {report.difference:.1e} "
            f"(rounding: up to {report.limit:.0e})"
        )
        click.echo(f"effect      the LoRA moves the base's prediction by {report.effect:.2%}")
        click.echo(f"good        in {duration(report.seconds)}")
    return {"file": str(file), "base": base, "hashes": hashed, **asdict(report)}


def _quieten_libraries() -> None:
    """Loading bars and 'no keys for the text encoder' would only bury the answer."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
