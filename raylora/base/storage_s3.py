"""Storage in an S3 bucket, at AWS or any store that speaks its protocol.

Imported only when an s3:// URL is opened, since botocore costs start-up time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from raylora.base import storage_s3_errors as errors
from raylora.base.errors import StorageError
from raylora.base.log import get_logger
from raylora.base.storage import Entry, Storage, checked_key, is_key, range_error

Result = TypeVar("Result")

TRIES = 6
FIRST_WAIT_SECONDS = 0.25  # doubles at each try: some 6 s in all, a store's failover or throttling
CONNECT_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 60.0
READ_BLOCK_BYTES = 4 * 2**20

_log = get_logger("storage")
# Not Python's shared generator: waiting must not move anybody's random numbers.
_jitter = random.SystemRandom()
_clients: dict[tuple[object, ...], Any] = {}
_clients_lock = threading.Lock()


class S3Storage(Storage):
    """Objects below s3://bucket/prefix; requests are tried again with growing pauses."""

    def __init__(self, place: str) -> None:
        # `place` is 'bucket/prefix', the URL without its 's3://'.
        bucket, _, prefix = place.strip("/").partition("/")
        if not re.fullmatch(r"[A-Za-z0-9._-]{3,63}", bucket):
            raise StorageError(
                "An s3 URL is 's3://bucket/prefix': a bucket of 3 to 63 letters, digits, '-' or "
                f"'.', and no credentials or address. For these set {errors.KEYS}, and "
                "AWS_ENDPOINT_URL when the store is not AWS."
            )
        self.bucket = bucket
        self.prefix = f"{checked_key(prefix)}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def read(self, key: str) -> bytes:
        return self._fetch(key, 0, None)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        return self._fetch(key, start, length)

    def write(self, key: str, data: bytes) -> None:
        name = self._name(key)
        self._request(
            "write", key, lambda s3: s3.put_object(Bucket=self.bucket, Key=name, Body=data)
        )

    def create(self, key: str, data: bytes) -> bool:
        name = self._name(key)
        unsure = False

        def put(s3: Any) -> bool:
            nonlocal unsure
            try:
                s3.put_object(Bucket=self.bucket, Key=name, Body=data, IfNoneMatch="*")
            except errors.CALL_ERRORS as error:
                if errors.is_condition(error):
                    return False
                unsure = unsure or errors.may_have_arrived(error)
                raise
            return True

        if self._request("write", key, put):
            return True
        # An earlier try may have stored the object although its answer was lost.
        return unsure and self.read(key) == data

    def entries(self, prefix: str = "") -> list[Entry]:
        return sorted(self.scan(prefix), key=lambda entry: entry.key)

    def scan(self, prefix: str = "") -> Iterator[Entry]:
        folder = self.prefix + (f"{checked_key(prefix.removesuffix('/'))}/" if prefix else "")
        for item in self._listing(prefix, folder):
            key = item["Key"][len(self.prefix) :]
            # Folder markers end in '/', which no key does.
            if is_key(key):
                yield Entry(key, item["Size"], item["ETag"].strip('"'))

    def entry(self, key: str) -> Entry | None:
        name = self._name(key)

        def head(s3: Any) -> Entry | None:
            try:
                answer = s3.head_object(Bucket=self.bucket, Key=name)
            except ClientError as error:
                if errors.is_missing_object(error):
                    return None
                raise
            return Entry(key, answer["ContentLength"], answer["ETag"].strip('"'))

        return self._request("look at", key, head)

    def delete(self, key: str) -> None:
        name = self._name(key)

        def delete(s3: Any) -> None:
            try:
                s3.delete_object(Bucket=self.bucket, Key=name)
            except ClientError as error:
                if not errors.is_missing_object(error):
                    raise

        self._request("delete", key, delete)

    def within(self, prefix: str) -> S3Storage:
        return S3Storage(f"{self.bucket}/{self._name(prefix.removesuffix('/'))}")

    def _name(self, key: str) -> str:
        return self.prefix + checked_key(key)

    def _listing(self, prefix: str, folder: str) -> Iterator[dict[str, Any]]:
        more: dict[str, str] = {}

        def page_of(s3: Any) -> dict[str, Any]:
            page: dict[str, Any] = s3.list_objects_v2(Bucket=self.bucket, Prefix=folder, **more)
            return page

        while True:
            page = self._request("list", prefix, page_of)
            yield from page.get("Contents", ())
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _fetch(self, key: str, start: int, length: int | None) -> bytes:
        """The object's bytes; a torn answer is taken up where it broke off."""
        name = self._name(key)
        blocks: list[bytes] = []
        tag = ""

        def get(s3: Any) -> None:
            nonlocal tag
            begin = start + sum(map(len, blocks))
            end = "" if length is None else str(start + length - 1)
            options = {"Range": f"bytes={begin}-{end}"} if begin or end else {}
            if tag:
                options["IfMatch"] = tag
            try:
                answer = s3.get_object(Bucket=self.bucket, Key=name, **options)
            except ClientError as error:
                if errors.is_past_end(error):
                    there = self.entry(key)
                    size = there.size_bytes if there else 0
                    raise range_error(f"{self.url}/{key}", start, length or 0, size) from error
                if tag and errors.is_condition(error):
                    # Replaced since the first bytes came: these belong to another object.
                    tag = ""
                    blocks.clear()
                raise
            if options.get("Range"):
                size = errors.size_in_range_answer(answer, f"{self.url}/{key}")
                if length is not None and start + length > size:
                    raise range_error(f"{self.url}/{key}", start, length, size)
            tag = answer["ETag"]
            while block := answer["Body"].read(READ_BLOCK_BYTES):
                blocks.append(block)

        self._request("read", key, get, progress=lambda: len(blocks))
        return b"".join(blocks)

    def _request(
        self,
        verb: str,
        key: str,
        call: Callable[[Any], Result],
        *,
        progress: Callable[[], int] = lambda: 0,
    ) -> Result:
        """Make one request, again after a pause while the failure may pass.

        Args:
            verb: what is done, for messages: "read", "write", "list", ...
            call: makes the request with the client it is given, and reads the answer.
            progress: grows when a failed try was not in vain; the count of tries then starts anew.
        """
        place = f"{self.url}/{key}".rstrip("/")
        tries, reached = 0, progress()
        while True:
            try:
                return call(_client())
            except errors.CALL_ERRORS as error:
                if progress() > reached:
                    tries, reached = 0, progress()
                tries += 1
                if tries == TRIES or not errors.may_pass(error):
                    raise errors.explained(error, verb, place, tries) from error
                wait = FIRST_WAIT_SECONDS * 2 ** (tries - 1) * _jitter.uniform(0.5, 1.0)
                _log.warning(
                    "%s %s: %s; try %d of %d in %.2f s",
                    verb,
                    place,
                    errors.in_words(error),
                    tries + 1,
                    TRIES,
                    wait,
                )
                time.sleep(wait)


def _client() -> Any:
    """This process's client for the present AWS_* environment; safe to share between threads."""
    settings = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
    digest = hashlib.blake2b(repr(settings).encode()).digest()  # a secret is no dictionary key
    # A forked process must not talk through its parent's sockets, hence the process id.
    key = (os.getpid(), digest, CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS)
    with _clients_lock:
        if key not in _clients:
            _clients[key] = _new_client()
        return _clients[key]


def _new_client() -> Any:
    import boto3
    from botocore.config import Config

    # At DEBUG botocore writes whole requests, session token included.
    for name in ("boto3", "botocore", "urllib3"):
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.INFO))
    config = Config(
        s3={"addressing_style": "path"},
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        read_timeout=READ_TIMEOUT_SECONDS,
        max_pool_connections=32,
        # Several S3-compatible stores refuse the newer default, "when_supported".
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # botocore itself reads AWS_DEFAULT_REGION only.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    try:
        return boto3.session.Session().client("s3", region_name=region, config=config)
    except ValueError as error:
        raise errors.bad_settings(error) from error
