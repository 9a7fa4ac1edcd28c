"""Shared fixtures. The environment comes first: torch and Ray read it when they are imported."""

# ruff: noqa: E402

from __future__ import annotations

import atexit
import os
import shutil
import tempfile


def _short_folder() -> str:
    """For Ray's sockets, whose paths may have 107 characters; pytest's own folders are longer."""
    folder = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TMPDIR": os.environ.get("RAY_TMPDIR") or _short_folder(),
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from faultproxy import FaultProxy
from s3server import BUCKET, OWNER, S3Server, running_s3_server

from raylora.base.storage import Storage, open_storage

if TYPE_CHECKING:
    from raylora.job import Job


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server; the AWS_* environment of this process and its children points at it."""
    with (
        running_s3_server(tmp_path_factory.mktemp("s3")) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", OWNER[0])
        patch.setenv("AWS_SECRET_ACCESS_KEY", OWNER[1])
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_REGION", "us-east-1")
        # Nothing of the person who runs the tests may leak in.
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield server


@pytest.fixture(scope="session")
def s3_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """The proxy alone, for fixtures that outlive a test and set the endpoint themselves."""
    with FaultProxy(s3_server.port) as proxy:
        yield proxy


@pytest.fixture
def fault_proxy(s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """The proxy with no faults and no counts; this test's S3 requests go through it."""
    s3_proxy.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy.url)
    return s3_proxy


@pytest.fixture
def s3_url(s3_server: S3Server) -> str:
    """A place of this test's own on the S3 server."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage, once as a folder and once on the S3 server."""
    if request.param == "file":
        return open_storage(str(tmp_path / "storage"))
    return open_storage(request.getfixturevalue("s3_url"))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A trained run: 6 steps, checkpoints at 3 and 6, previews of two prompts at 0, 3 and 6.

    Its rate is high, so that pictures differ from step to step. Read it; write elsewhere.
    """
    from small import ROOT, small_job, train_small

    job = small_job(
        str(tmp_path_factory.mktemp("small-run")),
        name="small",
        data__folder=str(ROOT / "jobs/quickstart/demo-data/holdout"),
        training__save_every_steps=3,
        optimizer__learning_rate=1e-2,
        schedule__warmup_steps=0,
        preview__prompts=["ink icon, red heart, symbol", "ink icon, dog face, animal"],
        preview__every_steps=3,
        preview__steps=4,
    )
    train_small(job)
    return job
