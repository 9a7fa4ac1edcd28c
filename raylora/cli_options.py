"""Options that several commands share, as decorators."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from raylora.base.errors import OptionError
from raylora.base.storage import open_storage

Function = TypeVar("Function", bound=Callable[..., Any])


def set_option(function: Function) -> Function:
    """`--set a.b=c`, any number of times; the function gets `overrides`, a tuple of "a.b=c"."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="PATH=VALUE",
        callback=_check_overrides,
        help="Set one option of the job, e.g. --set network.rank=8; may be given again.",
    )(function)


def json_option(function: Function) -> Function:
    """`--json`; the function gets `as_json`, and what it returns is printed."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print one JSON document on standard output and nothing else there.",
    )(function)


def _check_overrides(
    context: click.Context, option: click.Parameter, overrides: tuple[str, ...]
) -> tuple[str, ...]:
    for override in overrides:
        path, equals, _ = override.partition("=")
        if not equals or not path.strip():
            raise OptionError(
                f"--set {override}: no path and value. Write it like --set network.rank=8."
            )
    return overrides


class LocalFile(click.ParamType[Path]):
    """A file by path or URL; one in storage is fetched into a folder that ends with the command."""

    name = "file"

    def convert(
        self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        """The file on this machine's disk; whether it is one is for its reader to say."""
        if isinstance(value, Path) or "://" not in value:
            return Path(value)
        place, _, name = value.rpartition("/")
        data = open_storage(place).read(name)
        folder = click.get_current_context().with_resource(tempfile.TemporaryDirectory())
        fetched = Path(folder) / name
        fetched.write_bytes(data)
        return fetched


def lora_file_argument(function: Function) -> Function:
    """FILE, a LoRA by path or URL; the function gets `file`, a local path."""
    return click.argument("file", type=LocalFile())(function)
