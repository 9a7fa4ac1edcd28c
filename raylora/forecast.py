"""What a job would do on cards that need not be here: `raylora.plan` and `raylora plan`.

Nothing is trained, downloaded or read of the base: what a step needs comes from a table of true
sizes, or is measured on models without weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from raylora.base.errors import DataError, JobError, StorageError, UserError
from raylora.base.storage import open_storage
from raylora.data.examine import Memories, examine_set
from raylora.data.pixels.bucket import Size
from raylora.data.pixels.decode import decoder_name
from raylora.data.rows import joined
from raylora.data.steps import StepPlan
from raylora.job import Job, with_overrides
from raylora.measure import asked_of_job, need_of_job, planning_family
from raylora.memory.card import Card
from raylora.memory.cards import card_named, cards_named, known_name
from raylora.memory.emulate import Kernels
from raylora.memory.plan import Candidate, CardPlan, Plan, PlanError, make_plan
from raylora.memory.prices import Price, priced, read_prices
from raylora.memory.probe import probe
from raylora.training.shares import split

NO_BF16 = "set training.precision: fp16"


_AGAIN = {
    "none": "nothing computed again",
    "mlp": "feed-forward parts computed again",
    "alternate": "every second block computed again",
    "all": "all blocks computed again",
}
_OTHERS = {
    "none": [],
    "mlp": ["feed-forward parts of the others too"],
    "alternate": ["every second of the others too"],
    "all": ["the others computed again too"],
}


@dataclass(frozen=True)
class Length:
    """What a job's data says of its run, as far as it can be listed from here.

    Attributes:
        bucket: the one with the largest area.
        steps: of the whole run; None where epochs are asked for and images cannot be counted.
        images: that are trained on; None where they cannot be counted.
        note: why they cannot be.
    """

    bucket: Size
    steps: int | None
    images: int | None
    note: str = ""


def plan(
    job: Job,
    gpus: str | Sequence[str] | None = None,
    *,
    each: bool = False,
    host_gib: float | None = None,
    prices: str | None = None,
) -> dict[str, Any]:
    """What fits on what, how fast, at what price, and why.

    Args:
        gpus: the workers' cards, e.g. `RTX3060-12G,2xA100-80G`; None takes the kinds that
            `fleet.workers` names, else this machine's own.
        each: plan every card by itself rather than all as one fleet.
        host_gib: free host memory beside each card that is not here.
        prices: a file of prices over the defaults.

    Returns:
        Plain data, as `raylora plan --json` prints it. With `each` a card that does not fit has a
        `problem` in place of workers.

    Raises:
        UserError: a card is not known, or the job does not fit; says what was tried and what helps.
    """
    held = read_prices(prices)
    cards = priced(cards_of(job, gpus, host_gib=host_gib), held)
    length = measure_length(job)
    groups = [[card] for card in _different(cards)] if each else [cards]
    return {
        "job": job.name,
        "family": job.family.kind,
        "weights": job.family.weights,
        "bucket": list(length.bucket),
        "images_per_step": job.training.images_per_step,
        "images": length.images,
        "steps": length.steps,
        "note": length.note,
        "predicted": True,
        "plans": [planned(job, group, length, held, each=each) for group in groups],
    }


def measure_length(job: Job) -> Length:
    """The largest bucket and the number of steps, from the images where they can be listed."""
    widest = max((options.resolution for options in job.sets), key=lambda size: size[0] * size[1])
    try:
        rows = _rows(job)
        if not len(rows):
            raise DataError("there are no images")
    except (DataError, StorageError, JobError) as error:
        note = f"images are not counted ({str(error).splitlines()[0]})"
        return Length(widest, job.training.steps, None, note)
    bucket = max(rows.showings_by_bucket(), key=lambda size: (size[0] * size[1], size))
    steps = job.training.steps
    if job.training.epochs is not None:
        each = StepPlan(rows, job.training.images_per_step, job.data.order_seed)
        steps = math.ceil(job.training.epochs * each.steps_per_epoch)
    return Length(bucket, steps, len(rows))


def _rows(job: Job) -> Any:
    cache = open_storage(job.cache_url)
    memories = Memories(cache, (decoder_name(),))
    found = [
        examine_set(number, options, job.data, cache, memories, trust=True).training
        for number, options in enumerate(job.sets)
    ]
    return joined(found)


def cards_of(
    job: Job, gpus: str | Sequence[str] | None = None, *, host_gib: float | None = None
) -> list[Card]:
    """The cards that a job is planned for, one a worker; arguments as `plan` has them."""
    if gpus is not None:
        words = gpus.split(",") if isinstance(gpus, str) else list(gpus)
        found = cards_named((word.strip() for word in words if word.strip()), host_gib=host_gib)
        if not found:
            raise UserError("--gpu names no card. Write cards as in --gpu RTX3060-12G,2xA100-80G.")
        return found
    kinds = () if isinstance(job.fleet.workers, int) else job.fleet.workers
    if any(kind.gpu for kind in kinds):
        unnamed = [kind for kind in kinds if kind.gpu is None]
        if unnamed:
            raise UserError(
                "fleet.workers has workers of no named gpu, and nothing is known of them. Name "
                "their gpu, or give the cards as --gpu RTX3060-12G,2xA100-80G."
            )
        return [
            card_named(str(kind.gpu), host_gib=host_gib)
            for kind in kinds
            for _ in range(kind.count)
        ]
    return _own_cards(job)


def _own_cards(job: Job) -> list[Card]:
    if torch.cuda.is_available() and not job.fleet.cpus_only:
        count = min(torch.cuda.device_count(), job.fleet.count)
        return [probe(torch.device("cuda", i), options=job.memory) for i in range(count)]
    if job.memory.budget_gib is not None:
        return [probe(torch.device("cpu"), options=job.memory)] * job.fleet.count
    raise UserError(
        "There is no GPU here to plan for, and the job names none. Say which cards: "
        "--gpu RTX3060-12G,RTX4090, or set memory.budget_gib to plan for this machine's CPU."
    )


def _different(cards: Sequence[Card]) -> list[Card]:
    return list({card.name: card for card in cards}.values())


def planned(
    job: Job, cards: list[Card], length: Length, prices: dict[str, Price], *, each: bool
) -> dict[str, Any]:
    """One fleet's plan as plain data; with `each` a misfit is told and not raised."""
    old = [card.name for card in cards if not card.bf16]
    advice = ""
    if job.training.precision == "bf16" and old:
        if not each:
            raise UserError(
                f"training.precision is bf16, and {_listed(old)} cannot compute it; a fleet has "
                f"one precision. For all of them {NO_BF16}, or leave these cards out."
            )
        job, advice = with_overrides(job, {"training.precision": "fp16"}), NO_BF16
    # Of a machine that is not here nobody knows what is installed, and it can be.
    here = all(card.free_bytes is not None or card.capability is None for card in cards)
    asked = asked_of_job(job) if here else replace(asked_of_job(job), bnb=True)
    try:
        made = make_plan(_need(job, length.bucket, cards), asked, cards)
    except PlanError as error:
        if not each:
            raise
        return {"cards": [card.name for card in cards], "advice": advice, "problem": str(error)}
    return {**_document(job, made, length, prices), "advice": advice}


def _need(job: Job, bucket: Size, cards: Sequence[Card]) -> Any:
    kernels: Kernels = "cpu" if all(card.capability is None for card in cards) else "cuda"
    return need_of_job(job, planning_family(job), bucket, kernels=kernels)


def _listed(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def _document(job: Job, made: Plan, length: Length, prices: dict[str, Price]) -> dict[str, Any]:
    images = job.training.images_per_step
    speeds = [1 / one.chosen.seconds_per_image for one in made.workers]
    pinned = None if job.fleet.shares == "measured" else job.fleet.shares
    weights = pinned if pinned is not None and len(pinned) == len(speeds) else speeds
    counts = split(images, weights)
    seconds = max(count / speed for count, speed in zip(counts, speeds, strict=True))
    workers = [
        _worker(one, count, seconds, prices)
        for one, count in zip(made.workers, counts, strict=True)
    ]
    hourly = [worker["dollars_per_hour"] for worker in workers]
    dollars = None if None in hourly else sum(hourly)
    whole = None if length.steps is None else length.steps * seconds
    return {
        "cards": [worker["card"] for worker in workers],
        "problem": "",
        "precision": made.precision.plain(),
        "precisions": [{**one.plain(), "why": why} for one, why in made.precisions],
        "workers": workers,
        "seconds_per_step": seconds,
        "steps_per_hour": 3600 / seconds,
        "eta_seconds": whole,
        "dollars_per_hour": dollars,
        "dollars_per_1000_steps": None if dollars is None else dollars * seconds / 3.6,
        "dollars": None if dollars is None or whole is None else dollars * whole / 3600,
    }


def _worker(
    one: CardPlan, images: int, step_seconds: float, prices: dict[str, Price]
) -> dict[str, Any]:
    """What one worker does; costs are of the whole step, since a worker that waits is paid too."""
    card, chosen = one.card, one.chosen
    alone = chosen.seconds_per_image * images
    together = min(chosen.setting.micro_batch, max(1, images))
    price = prices.get(known_name(card.name) or card.name)
    hourly = card.dollars_per_hour
    return {
        "card": card.name,
        "total_bytes": card.total_bytes,
        "free_bytes": card.free_bytes,
        "usable_bytes": one.budget_bytes,
        "host_bytes": chosen.host_bytes,
        "host_usable_bytes": one.host_budget_bytes,
        "setting": chosen.setting.plain(),
        "resident_bytes": one.resident_bytes,
        "streamed_bytes": one.streamed_bytes,
        "tiled_previews": one.tiled,
        "streamed_encoders": list(one.streamed_encoders),
        "peaks": dict(chosen.peaks),
        "images": images,
        "micro_batch": together,
        "accumulation": -(-images // together),
        "busy_seconds": alone,
        "seconds_per_step": step_seconds,
        "dollars_per_hour": hourly,
        "price": price.said if price is not None and hourly is not None else "",
        "dollars_per_1000_steps": None if hourly is None else hourly * step_seconds / 3.6,
        "candidates": [
            {
                "setting": tried.setting.plain(),
                "peak": max(tried.peaks.values(), default=0),
                "host_bytes": tried.host_bytes,
                "seconds_per_image": tried.seconds_per_image,
                "fits": not tried.reason,
                "taken": tried.setting == chosen.setting,
                "why": _why(tried, chosen),
            }
            for tried in one.candidates
        ],
    }


def _why(tried: Candidate, chosen: Candidate) -> str:
    """Why a setting was taken or not, in a few words."""
    if tried.reason:
        return tried.reason
    if tried.setting == chosen.setting:
        return "taken: the fastest that fits"
    slower = tried.seconds_per_image / chosen.seconds_per_image - 1
    return f"fits, {slower:.0%} slower" if slower >= 0.005 else "fits, no faster"


def setting_words(setting: Mapping[str, Any]) -> str:
    """What a worker does to fit, for people; `setting` as `Setting.plain` has it."""
    again, share = setting["checkpointing"], setting["streamed"]
    said = [_AGAIN[again]]
    if share:
        # Streamed blocks are computed again, whatever becomes of the others.
        said = [f"{share:.0%} streamed and computed again", *_OTHERS[again]]
    if setting["offload"]:
        said.append("their inputs on the host")
    if setting["host_states"]:
        said.append("optimizer states on the host")
    return ", ".join(said)


def precision_words(precision: Mapping[str, Any]) -> str:
    """Arithmetic, base and states, for people; as `Precision.plain` has it."""
    base, states = precision["base"], precision["states"]
    held = "base in full" if base == "full" else f"base {base}"
    return f"{precision['arithmetic']}, {held}" + (", states 8bit" if states == "8bit" else "")
