"""`raylora COMMAND ...`: finds the command's file, runs it, and turns errors into exit codes.

0 done; 2 the person's mistake, told in one sentence; 1 anything else. With `--json` standard output
holds one JSON document, of the result or of the error, and everything else goes to standard error.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import math
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from raylora.base.errors import JobError, RayloraError, UserError
from raylora.base.log import start_logging
from raylora.base.lookup import did_you_mean, load_plugin, plugins

COMMANDS = "raylora.commands"
DONE, FAILED, MISTAKE = 0, 1, 2


class CommandFolder(click.Group):
    """The files of `raylora/commands`, each imported only when its command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the files."""
        return plugins(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the file of that name; None when there is none."""
        if cmd_name not in plugins(COMMANDS):
            return None
        command = load_plugin(COMMANDS, cmd_name).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of the first word; a usage error suggests the nearest one."""
        names = plugins(COMMANDS)
        if args and args[0] not in names and not args[0].startswith("-"):
            ctx.fail(f"{args[0]!r} is no command.{did_you_mean(args[0], names)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `raylora --help`, from the files' first lines."""
        rows = [(name, first_line(name)) for name in plugins(COMMANDS)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def first_line(name: str) -> str:
    """First line of a command's docstring, read without importing the file."""
    path = Path(importlib.import_module(COMMANDS).__path__[0]) / f"{name}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


@click.command(cls=CommandFolder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="raylora", message="raylora %(version)s")
def raylora() -> None:
    """Train, sweep and preview LoRAs for image diffusion models on any fleet of GPUs."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit code."""
    start_logging()
    # Before torch is imported: threads that spin while they wait make a busy CPU many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(arguments)
    if "--json" not in arguments:
        code, _ = _guarded(arguments)
        return code
    with contextlib.redirect_stdout(sys.stderr):
        code, document = _guarded(arguments)
    if document is not None:
        click.echo(json.dumps(_finite(document), indent=2))
    return code


def main() -> None:
    """The console script."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # `raylora ... | head` has read enough; nothing more can be said on standard output.
        sys.stderr.close()
        code = FAILED
    sys.exit(code)


def _guarded(arguments: list[str]) -> tuple[int, Any]:
    """Exit code and JSON document of one command line; people's messages go to standard error."""
    try:
        # Without standalone mode click returns what the command returns, or the code of `exit()`.
        returned = raylora.main(arguments, "raylora", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        return MISTAKE, _told(error.format_message())
    except click.UsageError as error:
        return MISTAKE, _told(error.format_message(), usage=error)
    except click.ClickException as error:
        return MISTAKE, _told(error.format_message())
    except JobError as error:
        return MISTAKE, _told(*error.problems)
    except UserError as error:
        return MISTAKE, _told(str(error))
    except RayloraError as error:
        return FAILED, _told(str(error))
    except (click.Abort, KeyboardInterrupt):
        return FAILED, _told("Stopped.")
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 (the outermost frame: told in full, never hidden)
        traceback.print_exc()
        return FAILED, {"error": f"{type(error).__name__}: {error}", "problems": [str(error)]}
    return (returned, None) if isinstance(returned, int) else (DONE, returned)


def _finite(value: Any) -> Any:
    """The document with null for NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _told(*problems: str, usage: click.UsageError | None = None) -> dict[str, Any]:
    """Say each problem on a line of standard error; the same as a JSON document."""
    if usage is not None and usage.ctx is not None:
        click.echo(usage.ctx.get_usage(), err=True)
    for problem in problems:
        click.echo(problem, err=True)
    return {"error": "\n".join(problems), "problems": list(problems)}


if __name__ == "__main__":
    main()
