"""What an S3 request's failure means: whether it may pass, and what to tell the person."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

from botocore import exceptions as boto
from botocore.exceptions import ClientError

from raylora.base.errors import MissingObject, StorageError

KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"

CALL_ERRORS = (ClientError, boto.BotoCoreError)
"""Everything a call of the client raises; botocore takes a torn listing for a 500."""

_PASSING = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
)
_NEVER_SENT = (
    boto.EndpointConnectionError,
    boto.ConnectTimeoutError,
    boto.ProxyConnectionError,
)
_PASSING_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, ClientError):
        # 501: the store lacks the feature, and will in a second.
        passing_status = _status(error) == 429 or (_status(error) >= 500 and _status(error) != 501)
        return passing_status or _code(error) in _PASSING_CODES or is_condition(error)
    return isinstance(error, _PASSING) and not isinstance(error, boto.SSLError)


def may_have_arrived(error: Exception) -> bool:
    """Whether the store may have done what was asked although this is all that came back."""
    if isinstance(error, ClientError):
        return _status(error) >= 500
    return not isinstance(error, _NEVER_SENT)


def is_condition(error: Exception) -> bool:
    """Whether a condition did not hold: a name is taken, or an object is not the one begun with."""
    return isinstance(error, ClientError) and _status(error) == 412


def is_past_end(error: Exception) -> bool:
    """Whether a range begins where the object has ended."""
    return isinstance(error, ClientError) and _status(error) == 416


def is_missing_object(error: Exception) -> bool:
    """Whether the store says that there is no such object (and not: no such bucket)."""
    return (
        isinstance(error, ClientError)
        and _status(error) == 404
        and _code(error) in {"NoSuchKey", "404", "NotFound"}
    )


def size_in_range_answer(answer: dict[str, Any], place: str) -> int:
    """The whole object's bytes, from the answer to a request for a part of it."""
    if "ContentRange" not in answer:
        raise StorageError(
            f"{place}: {endpoint()} sent the whole object when a part of it was asked for. "
            "raylora needs byte ranges; choose a store that has them."
        )
    return int(answer["ContentRange"].rpartition("/")[2])


def bad_settings(error: Exception) -> StorageError:
    """The error when no client can be made from the environment."""
    return StorageError(
        f"The AWS_* environment variables do not make a connection ({error}). AWS_ENDPOINT_URL is "
        "a full address such as http://127.0.0.1:9000, AWS_REGION a word such as us-east-1."
    )


def in_words(error: Exception) -> str:
    """The failure in a few words, without addresses or keys."""
    if isinstance(error, ClientError):
        status, code = str(_status(error)), _code(error)
        return status if code == status else f"{status} {code}"
    return type(error).__name__


def explained(error: Exception, verb: str, place: str, tries: int) -> StorageError:
    """The error a person gets: what was found, where, and what to try next.

    Args:
        verb: what was asked: "read", "write", "list", "look at", "delete".
        place: the object's s3:// URL.
        tries: how often it was asked.
    """
    if is_missing_object(error):
        return MissingObject(f"{place}: there is no such object. Check the bucket and the name.")
    found, advice = _found_and_advice(error, place)
    often = f", {tries} times" if tries > 1 else ""
    return StorageError(f"{place}: could not {verb} it{often}: {found}. {advice}")


def _found_and_advice(error: Exception, place: str) -> tuple[str, str]:
    where = endpoint()
    if isinstance(error, _NO_CREDENTIALS):
        return "no credentials were found", f"Set {KEYS} (and AWS_SESSION_TOKEN if you have one)."
    if isinstance(error, boto.SSLError):
        return f"the TLS connection to {where} failed", "Check AWS_CA_BUNDLE and the clock."
    if isinstance(error, _NEVER_SENT):
        return f"{where} cannot be reached", "Check AWS_ENDPOINT_URL and the network."
    if isinstance(error, ClientError):
        return _answer_and_advice(error, place, where)
    return f"{where} did not answer in full ({in_words(error)})", "Check the network, then resume."


def _answer_and_advice(error: ClientError, place: str, where: str) -> tuple[str, str]:
    code, status = _code(error), _status(error)
    bucket = "/".join(place.split("/", 3)[:3])
    if code == "NoSuchBucket":
        return f"{where} has no bucket {bucket}", "Create the bucket, or correct the URL."
    if code in {"SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken"}:
        return (
            f"{where} refuses these credentials ({code})",
            f"Check that {KEYS} belong together and to AWS_ENDPOINT_URL, and are still valid.",
        )
    if code == "RequestTimeTooSkewed":
        return f"{where} finds this machine's clock wrong", "Set the clock."
    if status == 403:
        return (
            f"access denied by {where} ({in_words(error)})",
            f"Allow these credentials to list, get, put and delete objects in {bucket}, or check "
            f"{KEYS}.",
        )
    if status in {301, 307, 400} and code in {
        "PermanentRedirect",
        "TemporaryRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "301",
        "307",
    }:
        return f"{bucket} is in another region", "Set AWS_REGION to the bucket's region."
    if status == 501:
        return (
            f"{where} lacks this operation ({in_words(error)})",
            "raylora needs conditional writes (If-None-Match); choose a store that has them.",
        )
    message = error.response.get("Error", {}).get("Message", "")
    return f"{where} answered {in_words(error)} {message}".rstrip(), "Look at the store's log."


def endpoint() -> str:
    """The store's address for messages: host and port, nothing that could be secret."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return "AWS S3"
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _status(error: ClientError) -> int:
    return int(_metadata(error).get("HTTPStatusCode", 0))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _metadata(error: ClientError) -> dict[str, Any]:
    metadata: dict[str, Any] = error.response.get("ResponseMetadata", {})
    return metadata
