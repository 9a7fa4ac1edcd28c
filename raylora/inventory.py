"""Taking stock of a data set: what `raylora data` reports, without a base and without a cache."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from raylora.base.errors import JobError
from raylora.base.options import Options, explain
from raylora.base.storage import open_storage
from raylora.data.examine import Examined, Memories, examine_set
from raylora.data.options import DataOptions, Native, SetOptions, resolve
from raylora.data.pixels.decode import decoder_name
from raylora.data.rows import KEY_BYTES, Rows, joined
from raylora.families import get_family
from raylora.job import load_job, set_overrides

_TAGS = 20
_JOB_ENDINGS = (".yaml", ".yml")
_SET_FILE_ENDINGS = (".toml", ".json")


class _Kind(Options):
    kind: str = "sd15"


class _Sections(Options):
    """What `--set` may say of a folder."""

    data: DataOptions
    family: _Kind = _Kind()


@dataclass(frozen=True)
class Target:
    """Data to take stock of.

    Attributes:
        cache_url: where what is learnt of the files is kept; None keeps nothing.
    """

    data: DataOptions
    sets: tuple[SetOptions, ...]
    cache_url: str | None


def open_target(target: str, overrides: Iterable[str]) -> Target:
    """A job's data, a data set file's, or a folder's.

    Raises:
        JobError: what is wrong with it, one sentence each.
    """
    if target.lower().endswith(_JOB_ENDINGS):
        job = load_job(target, overrides)
        return Target(job.data, job.sets, job.cache_url)
    word = "toml" if target.lower().endswith(_SET_FILE_ENDINGS) else "folder"
    tree: dict[str, Any] = {"data": {word: target}}
    set_overrides(tree, overrides)
    try:
        sections = _Sections.model_validate(tree)
    except ValidationError as error:
        raise JobError(explain(error, _Sections)) from None
    family = get_family(sections.family.kind)[1]
    native = Native(family.native_resolution, family.bucket_step)
    return Target(sections.data, resolve(sections.data, native), None)


def take_stock(target: Target, *, rehash: bool = False) -> dict[str, Any]:
    """Examine every set: nothing is drawn, nothing is encoded, nothing is refused."""
    with _cache(target.cache_url) as url:
        cache = open_storage(url)
        memories = Memories(cache, (decoder_name(),))
        examined = [
            examine_set(number, one.held_out(), target.data, cache, memories, trust=not rehash)
            for number, one in enumerate(target.sets)
        ]
    rows = [joined([one.training, one.held_out]) for one in examined]
    every = joined(rows)
    return {
        "sets": [_of_set(*each) for each in zip(examined, rows, target.sets, strict=True)],
        "images": len(every),
        "showings": int(every.repeats.sum()),
        "buckets": {
            f"{w}x{h}": count for (w, h), count in sorted(every.showings_by_bucket().items())
        },
        "pictures": _of_pictures(rows, target.sets) if len(every) else {},
        "captions": _of_captions(rows, target.sets) if len(every) else {},
        "bad": [
            {"set": one.set, "key": one.key, "reason": one.reason}
            for part in examined
            for one in part.bad
        ],
        "uncaptioned": [key for part in examined for key in part.uncaptioned],
        "notes": [note for part in examined for note in part.notes],
    }


def _of_set(examined: Examined, rows: Rows, options: SetOptions) -> dict[str, Any]:
    width, height = options.resolution
    return {
        "place": examined.folder,
        "images": examined.images,
        "bad": len(examined.bad),
        "uncaptioned": len(examined.uncaptioned),
        "showings": int(rows.repeats.sum()),
        "held_out": len(examined.held_out),
        "resolution": [width, height],
        "is_reg": options.is_reg,
    }


def _of_pictures(rows: Sequence[Rows], sets: Sequence[SetOptions]) -> dict[str, Any]:
    """Sizes, copies, and what becomes of the pictures on the way to their buckets."""
    sizes = np.concatenate([part.original_size for part in rows])
    scales, cuts = [], []
    for part, options in zip(rows, sets, strict=True):
        found, counts = np.unique(part.original_size, axis=0, return_counts=True)
        for (width, height), same in zip(found.tolist(), counts.tolist(), strict=True):
            place = options.buckets.place((width, height), options.fit)
            scales += [max(place.resized[0] / width, place.resized[1] / height)] * same
            kept = min(place.resized[0], place.bucket[0]) * min(place.resized[1], place.bucket[1])
            cuts += [1 - kept / (place.resized[0] * place.resized[1])] * same
    names = [part.latents_keys[:, 0].reshape(-1, KEY_BYTES) for part in rows]
    copies = sum(len(one) - len(np.unique(one, axis=0)) for one in names)
    order = np.argsort(sizes[:, 0].astype(np.int64) * sizes[:, 1])
    return {
        "smallest": sizes[order[0]].tolist(),
        "median": sizes[order[len(order) // 2]].tolist(),
        "largest": sizes[order[-1]].tolist(),
        "enlarged": sum(scale > 1 for scale in scales),
        "enlarged_most": round(max(scales), 2),
        "cut_off_mean": round(float(np.mean(cuts)), 4),
        "cut_off_most": round(max(cuts), 4),
        "copies": copies,
    }


def _of_captions(rows: Sequence[Rows], sets: Sequence[SetOptions]) -> dict[str, Any]:
    tags: Counter[str] = Counter()
    captions: Counter[str] = Counter()
    for part, options in zip(rows, sets, strict=True):
        for caption in part.captions.to_pylist():
            captions[caption] += 1
            tags.update(
                tag.strip() for tag in caption.split(options.caption_separator) if tag.strip()
            )
    return {
        "different": len(captions),
        "empty": captions[""],
        "tags": len(tags),
        "most_frequent": dict(tags.most_common(_TAGS)),
    }


def _cache(url: str | None) -> AbstractContextManager[str]:
    return tempfile.TemporaryDirectory(prefix="raylora-data-") if url is None else nullcontext(url)
