"""One cluster for all tests with Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from s3server import S3Server

from raylora.fleet import FleetOptions
from raylora.on_ray.resources import connect


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs the cluster."""
    for item in items:
        if "tests/ray/" in item.path.as_posix():
            item.add_marker("ray")


@pytest.fixture(scope="session")
def ray_cluster(s3_server: S3Server) -> Iterator[None]:
    """A cluster of 3 CPUs on this machine, which this process is connected to.

    The S3 server comes first: workers have the AWS_* environment of the cluster's start.
    """
    import ray

    assert "RAY_ADDRESS" not in os.environ, "the tests start a cluster of their own"
    connect(FleetOptions(workers=3, cpus_only=True))
    yield
    ray.shutdown()
