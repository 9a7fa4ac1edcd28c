"""Real processes that start quickly: forked from a server that has torch and diffusers loaded."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")


def _start_server() -> None:
    """Start the fork server now, where it finds `preloaded`.

    Python 3.11's does not get this process's sys.path, and says nothing when it cannot import.
    """
    CONTEXT.set_forkserver_preload(["preloaded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [os.path.dirname(os.path.abspath(__file__)), before])
    )
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


if multiprocessing.current_process().name == "MainProcess":
    _start_server()


class Child:
    """A process that runs `function(*arguments)`; its result or error comes back by `result`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._receive, send = CONTEXT.Pipe(duplex=False)
        # The fork server's environment is that of its start; S3 servers and proxies come later.
        self.process = CONTEXT.Process(
            target=_run, args=(send, dict(os.environ), function, arguments), daemon=True
        )
        self.process.start()
        send.close()

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.join()

    def running(self, seconds: float) -> bool:
        """Whether it still runs after so many seconds."""
        self.process.join(seconds)
        return self.process.is_alive()

    def result(self, seconds: float = 120) -> Any:
        """What the function returned; its error is raised here, as text."""
        if not self._receive.poll(seconds):
            self.kill()
            raise TimeoutError(f"the child did not answer in {seconds} s")
        kind, value = self._receive.recv()
        self.process.join()
        if kind == "error":
            raise AssertionError(value)
        return value


def _run(
    send: Connection,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    assert "preloaded" in sys.modules, "the fork server could not import preloaded"
    try:
        send.send(("value", function(*arguments)))
    except BaseException:  # noqa: BLE001 (told to the parent, whatever it is)
        send.send(("error", traceback.format_exc()))
        sys.exit(1)


def together(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `function(rank, *arguments)` in `size` processes of one gloo group; results by rank."""
    port = free_port()
    children = [Child(_in_group, rank, size, port, function, arguments) for rank in range(size)]
    return [child.result() for child in children]


def _in_group(
    rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    import torch

    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    try:
        return function(rank, *arguments)
    finally:
        torch.distributed.destroy_process_group()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])
