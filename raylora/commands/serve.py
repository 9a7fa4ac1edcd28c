"""Serve pictures of what a store's runs have learned, the adapter chosen per request."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
from typing import Any

import click
import yaml
from pydantic import ValidationError

from raylora.base.errors import OptionError
from raylora.base.options import explain
from raylora.base.storage import open_storage
from raylora.base.yaml_file import parse_yaml
from raylora.cli_options import json_option, set_option
from raylora.fleet import FleetOptions
from raylora.gallery import example, with_base
from raylora.on_ray.resources import connect
from raylora.serving.library import Library
from raylora.serving.options import TOKEN_VARIABLE, ServeOptions

_LOOPBACK = ("127.0.0.1", "localhost")


@click.command()
@click.argument("store")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port; 0 takes a free one.")
@set_option
@json_option
def command(store: str, host: str, port: int, overrides: tuple[str, ...], as_json: bool) -> None:
    """Serve pictures of what the runs in STORE (a folder or s3://) have learned.

    Prints the URL, the file that holds the token, and a command to try; Ctrl-C ends it. The token
    is that of RAYLORA_SERVE_TOKEN where it is set. With --json, one line with url and token_file.
    """
    storage = open_storage(store)
    options = with_base(Library(storage), serve_options(host, port, overrides))
    request = None if as_json else example(Library(storage), options)
    # Taken away, or every process of a cluster that is started here would inherit it.
    token = os.environ.pop(TOKEN_VARIABLE, None)
    try:
        _handle_sigterm()
        connect(_fleet(options), needs_gpu=False)  # it draws on CPUs where there is none
        _handle_sigterm()  # again: Ray has taken it, and would leave Serve behind where it joined
        _serve(storage.url, options, token, request)
    except KeyboardInterrupt:
        click.echo("Stopped.", err=True)


def serve_options(host: str, port: int, overrides: tuple[str, ...]) -> ServeOptions:
    """The options of a command line; OptionError tells every mistake."""
    tree: dict[str, Any] = {"host": host, "port": port}
    for override in overrides:
        word, _, text = override.partition("=")
        try:
            tree[word.strip()] = parse_yaml(text)
        except yaml.YAMLError:
            raise OptionError(f"--set {override}: the value is not YAML.") from None
    try:
        return ServeOptions.model_validate(tree)
    except ValidationError as error:
        raise OptionError(" ".join(explain(error, ServeOptions))) from None


def _serve(
    store: str, options: ServeOptions, token: str | None, request: dict[str, Any] | None
) -> None:
    """Serve until a signal; say where on standard output, as JSON when there is no request."""
    from raylora.on_ray.serve import serving

    with serving(store, options, token=token) as served:
        if options.host not in _LOOPBACK:
            click.echo("Plain HTTP: let only networks you trust reach this address.", err=True)
        if request is None:
            # The line is wanted now; what a command returns is printed when it ends.
            line = json.dumps({"url": served.url, "token_file": served.token_file})
            click.echo(line, file=sys.__stdout__)
        else:
            shown = f"$(cat {served.token_file})" if served.token_file else f"${TOKEN_VARIABLE}"
            curl = f'curl -H "Authorization: Bearer {shown}"'
            body = shlex.quote(json.dumps(request))
            click.echo(f"url    {served.url}")
            click.echo(f"token  {served.token_file or f'that of {TOKEN_VARIABLE}'}")
            click.echo(f"try    {curl} -o picture.png {served.url}/render -d {body}")
            click.echo(f"       {curl} {served.url}/adapters")
        threading.Event().wait()


def _handle_sigterm() -> None:
    """Make SIGTERM end the command as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _fleet(options: ServeOptions) -> FleetOptions:
    return FleetOptions(
        workers=options.replicas,
        cpus_only=options.cpus_only,
        cpus_per_worker=options.cpus_per_replica,
    )
