"""The tests' own proxy does what it says, for pyarrow's S3 client too (in chunks, in parts)."""

from __future__ import annotations

import os

import pyarrow.fs
import pytest
from faultproxy import FaultProxy
from s3server import OWNER

from raylora.base.storage import open_storage

BODY = os.urandom(12 * 2**20)


@pytest.fixture
def arrow(fault_proxy: FaultProxy) -> pyarrow.fs.S3FileSystem:
    return pyarrow.fs.S3FileSystem(
        access_key=OWNER[0],
        secret_key=OWNER[1],
        endpoint_override=fault_proxy.url.removeprefix("http://"),
        scheme="http",
        region="us-east-1",
    )


def test_uploads_in_parts_pass_and_are_counted(
    arrow: pyarrow.fs.S3FileSystem, fault_proxy: FaultProxy, s3_url: str
):
    fault_proxy.fail_next(1, kind="503", method="PUT")
    fault_proxy.fail_next(1, kind="reset_after", method="PUT")
    with arrow.open_output_stream(f"{s3_url.removeprefix('s3://')}/object") as stream:
        stream.write(BODY)
    assert open_storage(s3_url).read("object") == BODY
    assert fault_proxy.count("PUT", "*/object") > 2
    assert fault_proxy.count("POST", "*/object") == 2


def test_a_hook_is_called_inside_an_upload_and_may_let_it_go_on(
    arrow: pyarrow.fs.S3FileSystem, fault_proxy: FaultProxy, s3_url: str
):
    there: list[object] = []
    storage = open_storage(s3_url)
    fault_proxy.on_put(
        "*/object", 2**20, lambda _: there.append(storage.entry("object")), cut=False
    )
    with arrow.open_output_stream(f"{s3_url.removeprefix('s3://')}/object") as stream:
        stream.write(BODY)
    assert there == [None]
    assert storage.read("object") == BODY
