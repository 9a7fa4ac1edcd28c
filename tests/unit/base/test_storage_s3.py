"""What the network and an S3 server can get wrong; every fault is a real one, made by the proxy."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import boto3
import pytest
from faultproxy import FaultProxy
from s3server import BUCKET, OWNER, READER, S3Server

from raylora.base import storage_s3
from raylora.base.errors import MissingObject, StorageError
from raylora.base.storage import Storage, open_storage

WRITE = """
import sys
from raylora.base.storage import open_storage
open_storage(sys.argv[1]).write("object", b"new" * 2**20)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between tries, and a server that hangs is given up soon."""
    monkeypatch.setattr(storage_s3, "FIRST_WAIT_SECONDS", 0.002)
    monkeypatch.setattr(storage_s3, "READ_TIMEOUT_SECONDS", 0.6)


@pytest.fixture
def place(s3_url: str, quick: None, fault_proxy: FaultProxy) -> Storage:
    """An empty place on the server, reached through the proxy."""
    return open_storage(s3_url)


def test_signed_requests_pass_the_proxy_and_are_counted(place: Storage, fault_proxy: FaultProxy):
    place.check()
    fault_proxy.reset_counts()
    place.write("a/ü +object", b"data")
    assert place.read("a/ü +object") == b"data"
    place.entries("a")
    assert fault_proxy.count("PUT", "*/a/ü +object") == 1
    assert fault_proxy.count("GET") == 1
    assert fault_proxy.count("LIST", "*/a/") == 1
    assert fault_proxy.count() == 3


@pytest.mark.parametrize("kind", ["503", "502_after", "429", "reset", "reset_after", "short"])
def test_every_request_survives_faults_that_pass(
    place: Storage, fault_proxy: FaultProxy, kind: str
):
    data = os.urandom(300_000)
    for use, right in (
        (lambda: place.write("object", data), None),
        (lambda: place.read("object"), data),
        (lambda: place.read_range("object", 1000, 5000), data[1000:6000]),
        (lambda: [entry.key for entry in place.entries()], ["object"]),
        (lambda: place.entry("object").size_bytes, len(data)),
        (lambda: place.create("created", data), True),
        (lambda: place.create("created", b"other"), False),
        (lambda: place.delete("object"), None),
    ):
        fault_proxy.clear()
        fault_proxy.fail_next(2, kind=kind)
        assert use() == right
        assert fault_proxy.count() >= (1 if kind == "short" else 3)
    assert place.read("created") == data
    assert place.entry("object") is None


@pytest.mark.slow
def test_a_server_that_hangs_is_asked_again(place: Storage, fault_proxy: FaultProxy):
    data = os.urandom(300_000)
    fault_proxy.fail_next(1, kind="slow", seconds=1.0)
    place.write("object", data)
    fault_proxy.fail_next(1, kind="slow", seconds=1.0)
    assert place.read("object") == data
    fault_proxy.fail_next(1, kind="slow", seconds=1.0)
    assert place.create("another", data)
    assert fault_proxy.count("PUT", "*/object") == 2
    assert fault_proxy.count("GET", "*/object") == 2


def test_a_slow_body_is_waited_for(place: Storage, fault_proxy: FaultProxy):
    fault_proxy.fail_next(2, kind="slow", seconds=0.2)
    place.write("object", b"data")
    assert place.read("object") == b"data"
    assert fault_proxy.count() == 2


@pytest.mark.parametrize("kind", ["reset_after", "slow", "504_after"])
def test_a_create_whose_answer_was_lost_is_still_ours(
    place: Storage, fault_proxy: FaultProxy, kind: str
):
    fault_proxy.fail_next(1, kind=kind, method="PUT", seconds=1.5)
    assert place.create("object", b"ours")
    assert place.read("object") == b"ours"


@pytest.mark.parametrize("kind", ["reset", "reset_after", "503"])
def test_a_name_taken_by_others_stays_theirs_whatever_the_network_does(
    place: Storage, fault_proxy: FaultProxy, kind: str
):
    place.write("object", b"theirs")
    fault_proxy.fail_next(2, kind=kind, method="PUT")
    assert not place.create("object", b"ours")
    assert place.read("object") == b"theirs"


def test_a_create_that_met_another_writer_is_asked_again(place: Storage, fault_proxy: FaultProxy):
    # As Amazon documents it: the other one may yet fail, so 409 is not yet "taken".
    fault_proxy.fail_next(2, kind="409", code="ConditionalRequestConflict", method="PUT")
    assert place.create("object", b"ours")
    fault_proxy.fail_next(2, kind="409", code="ConditionalRequestConflict", method="PUT")
    assert not place.create("object", b"others")


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (
            "501",
            "NotImplemented",
            r"lacks this operation \(501 NotImplemented\). raylora needs cond",
        ),
        ("301", "PermanentRedirect", r"is in another region. Set AWS_REGION to the bucket's"),
        ("400", "EntityTooLarge", r"answered 400 EntityTooLarge asked for by a test. Look at the"),
        ("403", "RequestTimeTooSkewed", r"finds this machine's clock wrong. Set the clock"),
    ],
)
def test_a_refusal_that_will_not_pass_is_told_at_once(
    place: Storage, fault_proxy: FaultProxy, status: str, code: str, sentence: str
):
    fault_proxy.fail_next(10, kind=status, code=code, method="PUT")
    with pytest.raises(StorageError, match=sentence):
        place.create("object", b"data")
    assert fault_proxy.count("PUT") == 1


def test_equal_bytes_of_others_are_not_ours_when_nothing_was_lost(place: Storage):
    place.write("object", b"same")
    assert not place.create("object", b"same")


def test_a_torn_download_goes_on_where_it_broke(
    place: Storage, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage_s3, "READ_BLOCK_BYTES", 65536)
    monkeypatch.setattr(storage_s3, "TRIES", 2)
    data = os.urandom(2**20)
    place.write("object", data)
    # Each answer brings half of what is left: with two tries a fresh start each time would fail.
    fault_proxy.fail_next(4, kind="short", method="GET")
    assert place.read("object") == data
    fault_proxy.fail_next(4, kind="short", method="GET")
    assert place.read_range("object", 1, 2**20 - 1) == data[1:]


def test_an_object_replaced_during_its_download_is_never_mixed(
    place: Storage, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage_s3, "READ_BLOCK_BYTES", 1000)
    place.write("object", b"a" * 100_000)

    def replace(_: float) -> None:
        place.write("object", b"b" * 100_000)

    fault_proxy.fail_next(1, kind="short", method="GET")
    monkeypatch.setattr(storage_s3.time, "sleep", replace)
    assert place.read("object") == b"b" * 100_000


def test_a_store_that_stays_down_is_named_after_six_tries(
    place: Storage, fault_proxy: FaultProxy, caplog: pytest.LogCaptureFixture
):
    fault_proxy.fail_next(100, kind="503")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(StorageError, match=r"could not write it, 6 times: .* answered 503 SlowDown"),
    ):
        place.write("object", b"data")
    assert fault_proxy.count("PUT") == 6
    assert "503 SlowDown; try 6 of 6 in 0." in caplog.text


def test_resets_without_end_are_named(place: Storage, fault_proxy: FaultProxy):
    fault_proxy.fail_next(100, kind="reset")
    with pytest.raises(StorageError, match=f"{fault_proxy.url} did not answer in full"):
        place.read("object")


def test_pauses_grow_and_differ(
    place: Storage, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    pauses: list[float] = []
    monkeypatch.setattr(storage_s3.time, "sleep", pauses.append)
    monkeypatch.setattr(storage_s3, "FIRST_WAIT_SECONDS", 0.25)
    fault_proxy.fail_next(5, kind="503")
    assert place.entry("object") is None
    bounds = [(0.125, 0.25), (0.25, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, 4.0)]
    assert all(low <= pause <= high for pause, (low, high) in zip(pauses, bounds, strict=True))
    assert len({pause / high for pause, (_, high) in zip(pauses, bounds, strict=True)}) > 1


def test_threads_share_a_storage_under_faults(place: Storage, fault_proxy: FaultProxy):
    fault_proxy.fail_next(10, kind="503")
    fault_proxy.fail_next(10, kind="reset_after")

    def use(number: int) -> bool:
        data = os.urandom(10_000)
        place.write(f"object{number}", data)
        return place.read(f"object{number}") == data

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(40)))
    assert len(place.entries()) == 40


@pytest.mark.parametrize("already_there", [False, True])
def test_a_client_killed_inside_an_upload_changes_nothing(
    place: Storage, fault_proxy: FaultProxy, already_there: bool
):
    if already_there:
        place.write("object", b"old")
    writer = subprocess.Popen([sys.executable, "-c", WRITE, place.url])
    fault_proxy.on_put("*/object", 2**20, lambda _: writer.send_signal(signal.SIGKILL))
    assert writer.wait(timeout=60) == -signal.SIGKILL
    time.sleep(0.05)
    assert [entry.key for entry in place.entries()] == (["object"] if already_there else [])
    if already_there:
        assert place.read("object") == b"old"
    assert place.create("object", b"new") != already_there


def test_an_upload_that_is_cut_is_begun_anew(place: Storage, fault_proxy: FaultProxy):
    seen: list[str] = []
    fault_proxy.on_put("*/object", 1000, seen.append)
    place.write("object", b"data" * 1000)
    assert place.read("object") == b"data" * 1000
    assert [key.rpartition("/")[2] for key in seen] == ["object"]
    assert fault_proxy.count("PUT") == 2


def test_listings_of_several_pages_are_complete(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    storage = open_storage(s3_url)
    keys = [f"folder/{number}" for number in range(7)]
    for key in keys:
        storage.write(key, b"")
    s3 = storage_s3._client()
    monkeypatch.setattr(s3, "list_objects_v2", partial(s3.list_objects_v2, MaxKeys=3))
    assert [entry.key for entry in storage.entries()] == keys
    assert [entry.key for entry in storage.entries("folder")] == keys


def test_a_scan_asks_for_a_page_when_it_needs_it(
    place: Storage, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    for number in range(7):
        place.write(f"folder/{number}", b"")
    s3 = storage_s3._client()
    monkeypatch.setattr(s3, "list_objects_v2", partial(s3.list_objects_v2, MaxKeys=3))
    fault_proxy.reset_counts()
    scan = place.scan("folder")
    asked = [(next(scan).key, fault_proxy.count("LIST")) for _ in range(7)]
    assert asked == [(f"folder/{number}", 1 + number // 3) for number in range(7)]
    assert list(scan) == []


def test_folder_markers_and_hidden_names_are_left_out(s3_server: S3Server, s3_url: str):
    s3 = boto3.client("s3", region_name="us-east-1", endpoint_url=s3_server.url)
    prefix = s3_url.removeprefix(f"s3://{BUCKET}/")
    for key in ("folder/", "folder/.hidden", "folder/image.png"):
        s3.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=b"")
    assert [entry.key for entry in open_storage(s3_url).entries()] == ["folder/image.png"]


def test_the_root_of_a_bucket_is_a_storage(s3_url: str):
    bucket = open_storage(f"s3://{BUCKET}/")
    assert bucket.url == f"s3://{BUCKET}"
    name = s3_url.rpartition("/")[2]
    bucket.write(f"{name}/object", b"data")
    assert open_storage(s3_url).read("object") == b"data"
    assert [entry.key for entry in bucket.entries(name)] == [f"{name}/object"]


def test_no_credentials_names_the_variables(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(
        StorageError,
        match=r"no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ):
        open_storage(s3_url).check()


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told(s3_url: str, monkeypatch: pytest.MonkeyPatch, variable: str):
    monkeypatch.setenv(variable, "wrong-hush")
    with pytest.raises(StorageError, match="refuses these credentials") as caught:
        open_storage(s3_url).check()
    assert "hush" not in str(caught.value)


def test_access_denied_is_told(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    open_storage(s3_url).write("object", b"data")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
    storage = open_storage(s3_url)
    assert storage.read("object") == b"data"
    with pytest.raises(StorageError, match=f"could not write it: access denied .* s3://{BUCKET}"):
        storage.check()


@pytest.mark.usefixtures("s3_server")
def test_a_missing_bucket_is_told():
    storage = open_storage("s3://no-such-bucket/x")
    with pytest.raises(StorageError, match=r"has no bucket s3://no-such-bucket. Create the bucket"):
        storage.check()
    with pytest.raises(StorageError, match="has no bucket"):
        storage.entries()
    with pytest.raises(StorageError, match="has no bucket") as caught:
        storage.read("object")
    assert not isinstance(caught.value, MissingObject)


@pytest.mark.usefixtures("quick")
def test_an_endpoint_that_is_not_there_is_told(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://name:hush@127.0.0.1:9")
    with pytest.raises(StorageError, match=r"http://127.0.0.1:9 cannot be reached. Check AWS_END"):
        open_storage(s3_url).check()


@pytest.mark.usefixtures("quick")
def test_the_endpoint_for_s3_alone_comes_first(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    open_storage(s3_url).check()


def test_an_endpoint_that_is_no_address_is_told(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL is a full address such as http://"):
        open_storage(s3_url).check()


def test_secrets_are_neither_pickled_nor_shown_nor_logged(
    place: Storage,
    fault_proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    token = "session-token-hush"
    caplog.set_level(logging.DEBUG)
    place.write("object", b"data")
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    fault_proxy.fail_next(1, kind="503")
    shown = [caplog.text]
    try:
        place.read("object")
    except StorageError as error:
        shown += [str(error), repr(error), repr(error.__cause__)]
    shown += [repr(place), str(place), str(vars(place)), repr(copy.deepcopy(place))]
    shown += [caplog.text, pickle.dumps(place).decode("latin-1")]
    assert "503 SlowDown" in caplog.text, "the log was not looked at"
    for secret in (OWNER[0], OWNER[1], token):
        assert all(secret not in text for text in shown)
