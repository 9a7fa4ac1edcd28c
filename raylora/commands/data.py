"""Look at a data set before any training: images, captions, buckets, what is wrong."""

from __future__ import annotations

from typing import Any

import click

from raylora.cli_options import json_option, set_option
from raylora.inventory import open_target, take_stock
from raylora.terminal import show_stock


@click.command("data")
@click.argument("target")
@click.option("--rehash", is_flag=True, help="Read every file again, whatever its date says.")
@set_option
@json_option
def command(target: str, rehash: bool, overrides: tuple[str, ...], as_json: bool) -> dict[str, Any]:
    """Report on TARGET: a folder of images, a data set file of sd-scripts, or a job file.

    No base is needed. `--set data.resolution=768` and the like say how it is to be trained; a
    folder or a data set file is taken as for Stable Diffusion 1.5 unless they do.
    """
    stock = take_stock(open_target(target, overrides), rehash=rehash)
    if not as_json:
        show_stock(stock)
    return stock
