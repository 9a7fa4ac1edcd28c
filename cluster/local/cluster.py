"""A small Ray cluster on this machine's loopback, with token authentication: start and stop.

    python cluster/local/cluster.py start [--cpus N] [--gpus N] [--folder DIR]
    python cluster/local/cluster.py stop  [--folder DIR]

Everything it makes lies in one folder of its own: the token (mode 0600), the ports, Ray's files. It
stops the processes it started, by their id, and no other Ray on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Short: the paths of Ray's sockets may have 107 characters.
DEFAULT_FOLDER = Path(f"/tmp/raylora-cluster-{os.getuid()}")
START_SECONDS = 120
STOP_SECONDS = 10
LOOPBACK = "127.0.0.1"
# As on a Mac, where Ray stays on the loopback; otherwise its servers listen to the whole network,
# whatever --node-ip-address says. Whoever joins the cluster needs it too.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "ray-client-server-port",
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    parser.add_argument("--gpus", type=int)
    given = parser.parse_args()
    folder = given.folder.absolute()
    if given.action == "stop":
        stop(folder)
        return
    state = start(folder, cpus=given.cpus, gpus=given.gpus)
    for name, value in client_environment(folder, state).items():
        say(f"export {name}={shlex.quote(value)}")
    say("# then, from the root of raylora:")
    say("#   ray job submit --working-dir . -- python jobs/train.py jobs/quickstart.yaml")
    say(f"#   python cluster/local/cluster.py stop --folder {shlex.quote(str(folder))}")


def start(folder: Path, *, cpus: int, gpus: int | None = None) -> dict[str, Any]:
    """Start a head node in the background and wait until it takes jobs.

    Returns:
        {"pid", "born", "port", "dashboard_port"}, which also lies in the folder for `stop`.
    """
    _own(folder)
    if (folder / "cluster.json").exists():
        running = json.loads((folder / "cluster.json").read_text())
        if _born(running["pid"]) == running["born"]:
            sys.exit(f"A cluster runs in {folder} already (process {running['pid']}). Stop it.")
    token = folder / "token"
    token.unlink(missing_ok=True)
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            _ray_start(folder, ports, cpus, gpus),
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    state = {
        "pid": process.pid,
        "born": _born(process.pid),
        "port": ports["port"],
        "dashboard_port": ports["dashboard-port"],
    }
    (folder / "cluster.json").write_text(json.dumps(state))
    if not _wait(lambda: process.poll() is not None or _answers(folder, state), START_SECONDS) or (
        process.poll() is not None
    ):
        log_tail = (folder / "head.log").read_text(errors="replace")[-2000:]
        stop(folder, keep_log=True)
        sys.exit(f"The cluster did not start; {folder / 'head.log'} ends with:\n{log_tail}")
    return state


def stop(folder: Path, *, keep_log: bool = False) -> None:
    """End the processes that `start` started there, and remove the folder's files."""
    if not (folder / "cluster.json").exists():
        sys.exit(f"No cluster was started in {folder}.")
    state = json.loads((folder / "cluster.json").read_text())
    pid = state["pid"]
    if _born(pid) == state["born"]:
        os.kill(pid, signal.SIGTERM)  # `ray start --block` ends what it started
        _wait(lambda: _born(pid) != state["born"], STOP_SECONDS)
    # The number of a session is not given away while the session has processes.
    for left in _session(pid) if _born(pid) in ("", state["born"]) else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    if keep_log:
        return
    shutil.rmtree(folder)


def client_environment(folder: Path, state: dict[str, Any]) -> dict[str, str]:
    """What a person's shell needs to use the cluster."""
    return {
        **LOOPBACK_ONLY,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_API_SERVER_ADDRESS": f"http://{LOOPBACK}:{state['dashboard_port']}",
        "RAY_ADDRESS": f"{LOOPBACK}:{state['port']}",
    }


def say(line: str) -> None:
    """A line for `eval`, or for people behind a '#'."""
    sys.stdout.write(line + "\n")


def _ray_start(folder: Path, ports: dict[str, int], cpus: int, gpus: int | None) -> list[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += [f"--temp-dir={folder}/ray", f"--num-cpus={cpus}", "--disable-usage-stats"]
    command += [f"--object-store-memory={2**30}"]
    return command + ([f"--num-gpus={gpus}"] if gpus is not None else [])


def _environment(folder: Path) -> dict[str, str]:
    """This shell's without what it knows of other clusters; `python` in a job is this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **kept,
        **LOOPBACK_ONLY,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
    }


def _own(folder: Path) -> None:
    """Make the folder, or see that it is this person's alone: it will hold the token."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = folder.lstat()
    if folder.is_symlink() or held.st_uid != os.getuid() or held.st_mode & 0o077:
        sys.exit(f"{folder} must be a folder that only you can open: chmod 700, or use --folder.")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def _answers(folder: Path, state: dict[str, Any]) -> bool:
    """Whether the job server takes the token, and knows its node."""
    token = (folder / "token").read_text()
    request = urllib.request.Request(
        f"http://{LOOPBACK}:{state['dashboard_port']}/api/jobs/",
        headers={"Authorization": f"Bearer {token}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if done():
            return True
        time.sleep(0.2)
    return False


def _born(pid: int) -> str:
    """When the process began; '' when it ended. A number used again has another time."""
    command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    state, _, born = (
        subprocess.run(command, capture_output=True, text=True).stdout.strip().partition(" ")
    )
    return "" if state.startswith("Z") else born.strip()


def _session(pid: int) -> list[int]:
    """Processes of the session that `start` opened, should any be left."""
    listed = subprocess.run(["ps", "-A", "-o", "pid="], capture_output=True, text=True).stdout
    found = []
    for one in map(int, listed.split()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(one) == pid:
                found.append(one)
    return found


if __name__ == "__main__":
    main()
