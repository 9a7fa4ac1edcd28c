"""The arithmetic of a job, counted before it runs: images, steps, epochs, tokens, bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylora.data.dataset import CachePlan, Rows
from raylora.data.kohya_count import batches_per_epoch, steps_for_epochs
from raylora.data.options import SetOptions
from raylora.data.pixels.bucket import Size
from raylora.data.rows import KEY_BYTES
from raylora.data.steps import StepPlan
from raylora.data.variants import PLAIN, draw_text
from raylora.families import Family
from raylora.job import Job

# Captions whose tokens are counted, evenly over the rows; a million would take a minute.
_COUNTED_CAPTIONS = 20_000


def count_job(job: Job, plan: CachePlan, plan_of_steps: StepPlan, total: int) -> dict[str, Any]:
    """Images, repeats, buckets, steps an epoch, epochs, and how sd-scripts would count.

    Args:
        total: global steps of the run.
    """
    rows, each = plan.rows, job.training.images_per_step
    counts = rows.showings_by_bucket()
    full = sum(count // each for count in counts.values())
    return {
        "images": len(rows),
        "bad_images": len(plan.bad),
        "images_with_repeats": plan_of_steps.samples_per_epoch,
        "sets": [count_set(rows, number, one) for number, one in enumerate(plan.facts.sets)],
        "buckets": {f"{w}x{h}": count for (w, h), count in sorted(counts.items())},
        "images_per_step": each,
        "steps_per_epoch": plan_of_steps.steps_per_epoch,
        "steps_of_one_bucket": full,
        "steps": total,
        "epochs": round(total / plan_of_steps.steps_per_epoch, 2),
        "sd_scripts": count_as_sd_scripts(rows, plan.facts.sets, each, total),
    }


def count_set(rows: Rows, number: int, options: SetOptions) -> dict[str, Any]:
    """What one set brings into an epoch."""
    of_set = rows.set == number
    return {
        "place": options.folder or options.manifest,
        "images": int(of_set.sum()),
        "showings": int(rows.repeats[of_set].sum()),
        "resolution": list(options.resolution),
        "is_reg": options.is_reg,
    }


def count_as_sd_scripts(
    rows: Rows, sets: tuple[SetOptions, ...], batch: int, steps: int
) -> dict[str, Any]:
    """The same images in sd-scripts at this batch size, on one GPU and on two."""
    groups: dict[int, Counter[Size]] = {}
    for group in sorted({options.group for options in sets}):
        members = [number for number, options in enumerate(sets) if options.group == group]
        groups[group] = rows.take(np.isin(rows.set, members)).showings_by_bucket()
    batches = sum(batches_per_epoch(counts.values(), batch) for counts in groups.values())
    each = [steps_for_epochs(1, batches, processes=processes) for processes in (1, 2)]
    return {
        "steps_per_epoch": each[0],
        "steps_per_epoch_on_2_gpus": each[1],
        "epochs_of_these_steps_on_2_gpus": round(steps / max(1, each[1]), 2),
    }


def count_tokens(job: Job, plan: CachePlan, family: Family) -> dict[str, Any]:
    """The longest caption in tokens, and how many are cut off; {} where no caption is counted.

    Of a data set with more than 20,000 images some evenly spaced ones are counted.
    """
    rows = plan.rows
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _COUNTED_CAPTIONS)).astype(int))
    part = rows.take(chosen) if len(rows) else rows
    texts = [
        draw_text(plan.facts.sets[row.set], row.caption, row.number, seed=0, variant=PLAIN)
        for row in part
    ]
    if not texts:
        return {}
    counts = family.count_tokens(texts)
    longest = int(np.argmax(counts))
    read = family.max_tokens
    return {
        "longest": counts[longest],
        "image": part[longest].key,
        "read": read,
        "counted": len(counts),
        "cut_off": sum(count > read for count in counts) if read else 0,
    }


def count_bytes(job: Job, plan: CachePlan, family: Family) -> dict[str, Any]:
    """How many variants the cache holds of pictures and captions, and their bytes."""
    rows, held = plan.rows, plan.held_out
    pictures = [] if job.data.pictures_live else [rows]
    texts = [] if job.data.texts_live else [rows]
    return {
        "pictures_each": 0 if job.data.pictures_live else rows.latents_keys.shape[1],
        "captions_each": 0 if job.data.texts_live else rows.text_keys.shape[1],
        "pictures": (count := _distinct([part.latents_keys for part in [*pictures, held]])),
        "captions": (written := 1 + _distinct([part.text_keys for part in [*texts, held]])),
        "picture_bytes": _mean_bytes(rows, family),
        "caption_bytes": family.text_bytes,
        "bytes": count * _mean_bytes(rows, family) + written * family.text_bytes,
    }


def token_advice(tokens: dict[str, Any], family: Family) -> str | None:
    """What to do about captions that are cut off."""
    if not tokens or not tokens["cut_off"]:
        return None
    fits = [size for size in family.longer_tokens if size >= tokens["longest"]]
    longer = fits or family.longer_tokens[-1:]
    usual = family.token_advice or "Shorten them."
    advice = f"Set family.max_tokens: {longer[0]}." if longer else usual
    return (
        f"{tokens['cut_off']} of {tokens['counted']} captions are longer than the "
        f"{tokens['read']} tokens that are read; the rest of them is cut off. The longest has "
        f"{tokens['longest']} ({tokens['image']}). {advice}"
    )


def _distinct(keys: list[NDArray[np.uint8]]) -> int:
    flat = [part.reshape(-1, KEY_BYTES) for part in keys]
    return len(np.unique(np.ascontiguousarray(np.concatenate(flat)).view(f"S{KEY_BYTES}")))


def _mean_bytes(rows: Rows, family: Family) -> int:
    counts = rows.showings_by_bucket()
    total = sum(family.latents_bytes(size) * count for size, count in counts.items())
    return round(total / max(1, sum(counts.values())))
