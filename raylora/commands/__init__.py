"""The contract of a command: what one file in this folder gives.

A file `commands/<name>.py` is `raylora <name>`. It begins with a one-line docstring, shown by
`raylora --help` without importing the file, and defines

    command: click.Command

Its function returns a JSON-able document, which `--json` prints, and prints what people read
itself (`click.echo`) when `as_json` is false. Mistakes are raised, never printed: a `UserError`
ends with exit code 2 and one sentence, anything else with 1. Shared options: `raylora.cli_options`.
Heavy imports (torch, ray, diffusers) at the top of the file are fine: it is imported only when
its command is called.
"""
