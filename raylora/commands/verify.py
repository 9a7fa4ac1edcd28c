"""Prove that a LoRA file means the same to diffusers as to raylora."""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from raylora.adapt.lora_file import AdapterFile, read_adapter
from raylora.adapt.predictions import verify_predictions
from raylora.adapt.recognise import FAMILIES, families_of
from raylora.base.errors import OptionError, WeightsError
from raylora.base.units import duration, mib
from raylora.cli_options import json_option, lora_file_argument
from raylora.families import get_family
from raylora.weights.base import open_base


@click.command()
@lora_file_argument
@click.option(
    "--base",
    required=True,
    metavar="BASE",
    help="The base the LoRA is for: a folder in diffusers layout, a .safetensors file, a model "
    "hub's id or a short name.",
)
@click.option(
    "--family",
    type=click.Choice(sorted(FAMILIES)),
    help="The base's family, where the file does not tell it.",
)
@json_option
def command(file: Path, base: str, family: str | None, as_json: bool) -> dict[str, Any]:
    """Prove that the LoRA FILE means the same to diffusers as to raylora.

    Every module's weights are compared, then whole predictions of the base: once with diffusers and
    peft loading the file (or with the adapter in the forward passes, where diffusers reads no such
    file), once with its weights merged by raylora. Exit code 0 only if all agree.
    """
    adapter = read_adapter(file)
    unfit = [word for word, fits in adapter.hash_checks.items() if fits is False]
    if unfit:
        raise WeightsError(
            f"{file}: {unfit[0]} does not fit the weights, so they were changed after they were "
            "saved. Take the file from where it was made."
        )
    _quieten_libraries()
    kind = family or family_of(file, adapter)
    make, options = get_family(kind)
    report = verify_predictions(
        file, make(open_base(base, kind=options.layout), options(kind=kind, weights=base))
    )
    hashed = [word for word, fits in adapter.hash_checks.items() if fits]
    if not as_json:
        click.echo(f"file        {file.name}, {mib(adapter.size_bytes)}, {report.modules} modules")
        fit = "fits" if len(hashed) == 1 else "fit"
        told = f"{' and '.join(hashed)} {fit}" if hashed else "none in the file"
        click.echo(f"hashes      {told}")
        if report.reader == "diffusers":
            click.echo(
                f"readers     diffusers and raylora read the same ΔW in {report.modules} of "
                f"{report.modules} modules (largest difference {report.reader_error:.1e})"
            )
        else:
            click.echo("readers     raylora alone: diffusers has no reader for such files")
        other = "diffusers with peft" if report.reader == "diffusers" else "the adapter in place"
        click.echo(
            f"prediction  {other} and merged weights differ by {report.difference:.1e} "
            f"(rounding: up to {report.limit:.0e})"
        )
        click.echo(f"effect      the LoRA moves the base's prediction by {report.effect:.2%}")
        click.echo(f"good        in {duration(report.seconds)}")
    return {"file": str(file), "base": base, "hashes": hashed, **asdict(report)}


def family_of(file: Path, adapter: AdapterFile) -> str:
    """What the file's header or its names tell.

    Raises:
        OptionError: they leave several families.
    """
    found = families_of(adapter)
    version = adapter.metadata.get("ss_base_model_version", "")
    told = "sd3" if version.startswith(_SD3) else _BY_HEADER.get(version)
    if told in found:
        return told
    if len(found) == 1:
        return next(iter(found))
    raise OptionError(
        f"{file} may be for {', '.join(sorted(found))}: nothing in it tells them apart. Name the "
        "base's family with --family."
    )


_BY_HEADER = {
    "sd_v1": "sd15",
    "sd_v2": "sd2",
    "sd_v2_v": "sd2",
    "sdxl_base_v1-0": "sdxl",
    "flux1": "flux1",
}
"""ss_base_model_version -> `family.kind`."""
_SD3 = "sd3"  # what SD 3's several words there begin with


def _quieten_libraries() -> None:
    """Loading bars and 'no keys for the text encoder' would only bury the answer."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
