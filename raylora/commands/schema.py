"""Print the JSON schema of job files, for editors that complete and check YAML."""

from __future__ import annotations

import json
from typing import Any

import click

from raylora.cli_options import json_option
from raylora.job import Job


@click.command("schema")
@json_option
def command(as_json: bool) -> dict[str, Any]:
    """Print the schema; the repository keeps it as job.schema.json."""
    schema = Job.model_json_schema()
    if not as_json:
        click.echo(json.dumps(schema, indent=2))
    return schema
