"""Ray Serve: the preview endpoint, started and ended.

An ingress answers HTTP; replicas hold one base each and change adapters from request to request.
The token stays in this process and its file: the cluster is given its SHA-256.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve

from raylora.base.errors import OptionError, UserError
from raylora.base.fetch import cache_home
from raylora.base.log import get_logger
from raylora.fleet import FleetOptions
from raylora.on_ray.ingress import Ingress, token_digest
from raylora.on_ray.replica import Replica
from raylora.on_ray.resources import worker_environment
from raylora.serving.options import TOKEN_VARIABLE, ServeOptions

log = get_logger("serve")

APPLICATION = "raylora"
_MIN_TOKEN_LETTERS = 16


@dataclass(frozen=True)
class Served:
    """A running endpoint.

    Attributes:
        token_file: holds the token that was made, for this user alone; None when one was given.
    """

    url: str
    token_file: str | None


@contextlib.contextmanager
def serving(store: str, options: ServeOptions, *, token: str | None = None) -> Iterator[Served]:
    """Serve a store on the connected cluster until the block ends.

    Args:
        store: its URL.
        options: as `gallery.with_base` completed them.
        token: the person's own; None makes one.

    Raises:
        UserError: a taken port, a token that is none, or Serve in use by others.
    """
    port = _free_port(options.host, options.port)
    if _serve_runs():
        raise UserError(
            "Ray Serve already runs on this cluster, with a port and applications of its own. Use "
            "another cluster, or end it with `serve shutdown`."
        )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with contextlib.ExitStack() as stack:
        secret, token_file = _made_token(stack) if token is None else (_checked(token), None)
        stack.callback(serve.shutdown)
        log.info("starting Ray Serve")
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": options.host, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        log.info("loading %s", "the base" if options.base else "replicas")
        application = _application(store, options, token_digest(secret))
        serve.run(application, name=APPLICATION, route_prefix="/")
        yield Served(f"http://{options.host}:{port}", token_file)


def _serve_runs() -> bool:
    """Whether the cluster has a Serve controller, whoever started it."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return any(actor["namespace"] == "serve" for actor in named)


def _application(store: str, options: ServeOptions, digest: str) -> Any:
    """The two deployments, bound together."""
    gpus = 0 if options.cpus_only else min(1, int(ray.cluster_resources().get("GPU", 0)))
    fleet = FleetOptions(cpus_only=not gpus, cpus_per_worker=options.cpus_per_replica)
    environment = {"env_vars": worker_environment(fleet)}
    replicas = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=options.replicas,
        # One is drawn and one is at hand; the others wait outside, where they are counted.
        max_ongoing_requests=2,
        max_queued_requests=options.max_queued,
        max_constructor_retry_count=1,
        ray_actor_options={
            "num_cpus": options.cpus_per_replica,
            "num_gpus": gpus,
            "runtime_env": environment,
        },
    ).bind(store, options, os.getcwd(), on_gpu=bool(gpus))
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0, "runtime_env": environment},
    )
    return ingress.bind(replicas, store, options, digest)


def _checked(token: str) -> bytes:
    """A token that a header can carry and nobody guesses."""
    if len(token) < _MIN_TOKEN_LETTERS or not (token.isascii() and token.isprintable()):
        raise OptionError(
            f"{TOKEN_VARIABLE} must be {_MIN_TOKEN_LETTERS} or more printable ASCII letters. "
            "Unset it to have a token made."
        )
    return token.encode()


def _made_token(stack: contextlib.ExitStack) -> tuple[bytes, str]:
    """A new token, and its file, which goes when the server does."""
    token = secrets.token_urlsafe(32).encode()
    folder = cache_home()
    folder.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(prefix="serve-", suffix=".token", dir=folder)  # mode 0600
    stack.callback(Path(path).unlink, missing_ok=True)
    with os.fdopen(handle, "wb") as file:
        file.write(token)
    return token, path


def _free_port(host: str, port: int) -> int:
    """The port, once it is seen to be free, or a free one for 0."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise OptionError(
            f"{host}:{port} cannot be listened on ({error.strerror}). Give another --port; 0 "
            "takes a free one."
        ) from None
