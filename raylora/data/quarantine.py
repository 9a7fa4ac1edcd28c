"""Images that are left out, listed with their reasons; too many of them stop the run."""

from __future__ import annotations

import json
from collections.abc import Sequence

from raylora.base.errors import DataError, MissingObject
from raylora.base.storage import Storage
from raylora.data.options import DataOptions
from raylora.data.rows import BadSample

QUARANTINE = "quarantine.jsonl"
_NAMED = 5


def check_bad_share(
    bad: Sequence[BadSample], images: int, data: DataOptions, cache_url: str
) -> None:
    """Refuse a data set of which too much cannot be read.

    Raises:
        DataError: more than `data.max_bad` of the images are bad; names the first few.
    """
    if len(bad) <= data.max_bad * images:
        return
    # Two sets may show the same file.
    named = list(dict.fromkeys(f"{sample.key}: {sample.reason}" for sample in bad))
    shown = "; ".join(named[:_NAMED])
    more = f"; … (all in {cache_url}/{QUARANTINE})" if len(named) > _NAMED else ""
    raise DataError(
        f"{len(bad)} of {images} images cannot be used, more than data.max_bad "
        f"{data.max_bad:g} allows. {shown}{more}. Repair or remove them, or raise data.max_bad."
    )


def write_quarantine(cache: Storage, folders: Sequence[str], bad: Sequence[BadSample]) -> None:
    """Bring the list of bad images of some data folders up to date, for people to read.

    The caches of several folders may share the list; lines of other folders stay.

    Args:
        folders: URL of each set's images, as `BadSample.set` counts them.
    """
    try:
        before = cache.read(QUARANTINE).decode().splitlines()
    except MissingObject:
        before = []
    others = [line for line in before if json.loads(line)["folder"] not in folders]
    ours = [
        json.dumps(
            {"folder": folders[sample.set], "key": sample.key, "reason": sample.reason},
            ensure_ascii=False,
        )
        for sample in bad
    ]
    lines = list(dict.fromkeys(others + ours))
    if lines != before:
        cache.write(QUARANTINE, "".join(f"{line}\n" for line in lines).encode())
