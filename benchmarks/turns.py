"""Contestants of a benchmark take turns, each in its own process, so that none is favoured.

A machine's speed changes from minute to minute: other programs share its caches. So nobody runs
alone: every contestant does a few steps while the others sleep, then it is the next one's turn,
and what is compared is what they used in the same round.
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
}
"""One thread a process: CPU seconds then count work, not threads that spin. Ray's workers, nice by
default, may not starve behind the others on a busy machine."""


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Gate:
    """A contestant's side: `wait()` after every few steps says what they used, and sleeps.

    May be pickled to another process of the contestant; whoever waits first is the one measured.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._talk: TextIO | None = None
        self._began = 0.0

    def wait(self) -> None:
        """The end of a turn. The first is not counted: it warms up."""
        used = cpu_seconds() - self._began
        if self._talk is None:
            caller = socket.socket(socket.AF_UNIX)
            caller.connect(self.address)
            self._talk = caller.makefile("rw")
            print(self.name, file=self._talk, flush=True)
        else:
            print(used, file=self._talk, flush=True)
        self._talk.readline()
        self._began = cpu_seconds()

    def sink(self, row: dict[str, Any]) -> None:
        """`wait`, as raylora's progress rows come."""
        if "images_per_second" in row:
            self.wait()

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "address": self.address, "_talk": None, "_began": 0.0}


@dataclass
class Contestant:
    """One that takes turns.

    Attributes:
        name: for people.
        arguments: of the Python process that plays it; `name` and the gate's address are added.
        process_seconds, tree_seconds: CPU seconds of each turn, of the process that waits at the
            gate and of it with all the contestant's other processes.
    """

    name: str
    arguments: Sequence[str]
    process_seconds: list[float] = field(default_factory=list)
    tree_seconds: list[float] = field(default_factory=list)


def take_turns(contestants: Sequence[Contestant], rounds: int, logs: Path) -> None:
    """Start all, then give each `rounds` turns; round by round, first and last changing places."""
    with (
        tempfile.TemporaryDirectory(prefix="turns-") as folder,
        socket.socket(socket.AF_UNIX) as hall,
    ):
        address = f"{folder}/gate"
        hall.bind(address)
        hall.listen()
        hall.settimeout(2.0)
        started = {one.name: _start(one, address, logs) for one in contestants}
        try:
            gates = _meet(hall, started, logs)
            for number in range(rounds):
                for one in contestants if number % 2 else reversed(contestants):
                    _turn(one, gates[one.name], started[one.name].pid)
            for gate in gates.values():
                print("the end", file=gate, flush=True)
            for process in started.values():
                process.wait(timeout=300)
        finally:
            for process in started.values():
                process.terminate()


def _start(one: Contestant, address: str, logs: Path) -> subprocess.Popen[bytes]:
    with (logs / f"{one.name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *one.arguments, one.name, address],
            env={**os.environ, **ENVIRONMENT},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _meet(
    hall: socket.socket, started: dict[str, subprocess.Popen[bytes]], logs: Path
) -> dict[str, TextIO]:
    gates: dict[str, TextIO] = {}
    while len(gates) < len(started):
        try:
            caller, _ = hall.accept()
        except TimeoutError:
            for name, process in started.items():
                if process.poll() is not None:
                    raise SystemExit(f"{name} ended early; see {logs}/{name}.log") from None
            continue
        caller.settimeout(None)
        gate = caller.makefile("rw")
        gates[gate.readline().strip()] = gate
    return gates


def _turn(one: Contestant, gate: TextIO, pid: int) -> None:
    before = _tree_seconds(pid)
    print("go", file=gate, flush=True)
    one.process_seconds.append(float(gate.readline()))
    one.tree_seconds.append(_tree_seconds(pid) - before)


def _tree_seconds(pid: int) -> float:
    """CPU seconds of a process and all below it that are alive."""
    root = psutil.Process(pid)
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
