"""Choosing what every worker does to fit: one precision for the run, one setting for each card.

The best precision with which every worker fits with exact strategies comes first, for it is what is
learned; within it each worker takes the fastest setting that fits in every phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from raylora.base.errors import MemoryPlanError
from raylora.base.units import GIB, gib
from raylora.memory.candidates import (
    BEYOND,
    Asked,
    Candidate,
    Judge,
    Room,
    Sized,
    budget_bytes,
    host_budget_bytes,
    kind_of,
    rooms_of,
    simplicity,
    sized_settings,
)
from raylora.memory.card import Card
from raylora.memory.need import Need
from raylora.memory.peaks import hold
from raylora.memory.seconds import RATES, Rates
from raylora.memory.setting import BASE_KINDS, Precision, Setting, States

__all__ = [
    "Asked",
    "Candidate",
    "CardPlan",
    "Plan",
    "PlanError",
    "budget_bytes",
    "host_budget_bytes",
    "make_plan",
    "shares",
]

PlanError = MemoryPlanError

STATES: tuple[States, ...] = get_args(States)


@dataclass(frozen=True)
class CardPlan:
    """What one worker does.

    Attributes:
        budget_bytes: of device memory that the plan may fill, the reserve taken off.
        host_budget_bytes: of host memory.
        chosen: the fastest that fits.
        candidates: of each kind of setting the fastest that fits, or the one that misses by least.
        rungs: of all settings those than which none is both smaller and faster, from the fastest;
            some beyond the budget too, which a measurement may allow.
        resident_bytes, streamed_bytes: of the denoiser's weights.
        tiled: previews are decoded in tiles.
        streamed_encoders: text encoders that are streamed while captions are encoded.
    """

    card: Card
    budget_bytes: int
    host_budget_bytes: int
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    rungs: tuple[Candidate, ...]
    resident_bytes: int
    streamed_bytes: int
    tiled: bool = False
    streamed_encoders: tuple[str, ...] = ()

    def known(self, setting: Setting) -> Candidate | None:
        """What was predicted of a setting, where it is one of these."""
        every = (self.chosen, *self.candidates, *self.rungs)
        return next((one for one in every if one.setting == setting), None)


@dataclass(frozen=True)
class Plan:
    """What the whole fleet does.

    Attributes:
        workers: in the order of the cards.
        precisions: every one that was thought of, the best first, and why it was taken or not.
    """

    precision: Precision
    workers: tuple[CardPlan, ...]
    precisions: tuple[tuple[Precision, str], ...]


@dataclass(frozen=True)
class Miss:
    """The setting that comes nearest on the worker that is furthest from fitting."""

    bytes: int
    room: Room
    sized: Sized

    @property
    def said(self) -> str:
        """For people."""
        reason = self.room.reason(self.sized.bytes)
        return f"{self.room.card.name}: {reason} at the least"


def make_plan(
    need: Need,
    asked: Asked,
    cards: Sequence[Card],
    *,
    kept: Precision | None = None,
    rates: Rates = RATES,
) -> Plan:
    """The best precision with which every worker fits, and the fastest setting of each within it.

    Args:
        kept: of the run that is taken up again; nothing else is tried.

    Raises:
        PlanError: no precision fits every worker.
    """
    assert cards, "a plan is for one card at least"
    assert need.arithmetic == asked.arithmetic, "measured in another arithmetic"
    _check_arithmetic(asked, cards)
    rooms = rooms_of(need, asked, cards)
    most = max(room.together for room in rooms)
    wanted = [(kept, _kept_problem(kept, asked))] if kept else _precisions(asked)
    said: dict[Precision, str] = {}
    misses: list[tuple[Precision, Miss]] = []
    fitting: dict[Precision, tuple[CardPlan, ...]] = {}
    for precision, problem in wanted:
        if problem:
            said[precision] = problem
            continue
        if fitting and asked.options.max_slowdown is None:
            said[precision] = "not needed"
            continue
        sized = sized_settings(need, asked, precision, most, rates)
        if not sized:
            said[precision] = "memory.offload_inputs: no block is computed again"
            continue
        miss = _worst_miss(rooms, sized)
        if miss is not None:
            misses.append((precision, miss))
            said[precision] = miss.said
            continue
        fitting[precision] = _plans(need, asked, precision, rooms, sized, rates)
        said[precision] = "fits"
    if not fitting:
        raise PlanError(_nothing_fits(need, asked, said, misses, kept))
    taken = _taken(fitting, asked.options.max_slowdown, said)
    said[taken] = "kept from the run's start" if kept else said[taken]
    return Plan(taken, fitting[taken], tuple(said.items()))


def _check_arithmetic(asked: Asked, cards: Sequence[Card]) -> None:
    lacking = sorted({card.name for card in cards if not card.bf16})
    if asked.arithmetic == "bf16" and lacking:
        raise PlanError(
            f"training.precision is bf16, which {', '.join(lacking)} cannot compute. Set "
            "training.precision: fp16 for the whole run, or leave them out of it."
        )


def _precisions(asked: Asked) -> list[tuple[Precision, str]]:
    """What the job allows, the best first, and why some cannot be had."""
    options = asked.options
    bases = BASE_KINDS if options.base == "auto" else (options.base,)
    kinds = STATES if options.states == "auto" else (options.states,)
    return [
        (precision, _problem(precision, asked))
        for precision in (Precision(asked.arithmetic, b, s) for b in bases for s in kinds)
    ]


def _problem(precision: Precision, asked: Asked) -> str:
    """Why a precision cannot be had here, whatever the memory."""
    if precision.base == "nf4" and not asked.bnb:
        return 'nf4 needs bitsandbytes: pip install "raylora[bnb]"'
    if precision.states == "8bit":
        if asked.state_bytes_8bit is None:
            return "the optimizer has no other form with states of 8 bits"
        if not asked.bnb:
            return 'states in 8 bits need bitsandbytes: pip install "raylora[bnb]"'
    return ""


def _kept_problem(kept: Precision, asked: Asked) -> str:
    """Why a run cannot go on as it was begun."""
    for word, was, now in (
        ("training.precision", kept.arithmetic, asked.arithmetic),
        ("memory.base", kept.base, asked.options.base),
        ("memory.states", kept.states, asked.options.states),
    ):
        if now not in ("auto", was):
            raise PlanError(
                f"{word} is {now}, and the run was begun with {was}, which is one choice for all "
                f"of it. Set {word}: {was}, or begin a new run under another `name`."
            )
    return _problem(kept, asked)


def _worst_miss(rooms: Sequence[Room], sized: Sequence[Sized]) -> Miss | None:
    """Of the worker that is furthest from fitting; None: every worker fits."""
    worst: Miss | None = None
    for room in dict.fromkeys(rooms):
        nearest = _nearest(room, sized)
        if nearest.bytes > 0 and (worst is None or nearest.bytes > worst.bytes):
            worst = nearest
    return worst


def _nearest(room: Room, sized: Sequence[Sized]) -> Miss:
    allowed = (one for one in sized if one.setting.micro_batch <= room.together)
    # Where host memory is short whatever is done, what needs least of the device tells most.
    found = min(
        allowed,
        key=lambda one: (room.misses(one.bytes), room.peak(one.bytes), simplicity(one.setting)),
    )
    return Miss(room.misses(found.bytes), room, found)


def _plans(
    need: Need,
    asked: Asked,
    precision: Precision,
    rooms: Sequence[Room],
    sized: Sequence[Sized],
    rates: Rates,
) -> tuple[CardPlan, ...]:
    """Each worker's; like ones are worked out once."""
    found = {
        room: _plan_card(need, Judge(need, asked, precision, room, rates), precision, room, sized)
        for room in dict.fromkeys(rooms)
    }
    return tuple(found[room] for room in rooms)


def _plan_card(
    need: Need, judge: Judge, precision: Precision, room: Room, sized: Sequence[Sized]
) -> CardPlan:
    """The fastest of what fits, and what is kept of the others."""
    near: list[tuple[bool, float, int, Sized]] = []
    kinds: dict[object, tuple[tuple[object, ...], Sized]] = {}
    best: tuple[tuple[object, ...], Sized] | None = None
    most = BEYOND * room.budget
    for one in sized:
        if one.setting.micro_batch > room.together:
            continue
        peak, beyond = room.peak(one.bytes), room.host(one.bytes) > room.host_budget
        seconds = judge.seconds(one) if peak <= most else 0.0
        # What fits comes before what does not; there the fastest, here what misses by least. A
        # host rounds the optimizer's step in its own way, so it is asked where nothing else fits.
        hosted = one.setting.host_states
        if peak <= room.budget and not beyond:
            order = (False, hosted, seconds, simplicity(one.setting))
        else:
            order = (True, hosted, room.misses(one.bytes), simplicity(one.setting))
        kind = kind_of(one.setting)
        if kind not in kinds or order < kinds[kind][0]:
            kinds[kind] = (order, one)
        if best is None or order < best[0]:
            best = (order, one)
        if peak <= most and not beyond:
            near.append((hosted, seconds, peak, one))
    assert best is not None
    chosen, held = best[1], hold(need.denoiser, precision, best[1].setting.streamed)
    return CardPlan(
        room.card,
        room.budget,
        room.host_budget,
        judge.candidate(chosen),
        tuple(judge.candidate(one) for _, one in sorted(kinds.values(), key=lambda e: e[0])),
        tuple(judge.candidate(one) for one in _frontier(near)),
        held.resident_bytes,
        held.streamed_bytes,
        bool(chosen.bytes.preview) and room.tiles(chosen.bytes),
        room.encoding.streamed if room.encoding else (),
    )


def _frontier(near: Sequence[tuple[bool, float, int, Sized]]) -> list[Sized]:
    """Those than which none is both smaller and faster, from the fastest; then, smaller still,
    those with states on the host."""
    found: list[Sized] = []
    least: int | None = None
    for *_, peak, one in sorted(near, key=lambda e: (*e[:3], simplicity(e[3].setting))):
        if least is None or peak < least:
            found.append(one)
            least = peak
    return found


def _taken(
    fitting: Mapping[Precision, tuple[CardPlan, ...]],
    max_slowdown: float | None,
    said: dict[Precision, str],
) -> Precision:
    """The best that fits, or the best that is not much slower than what is smaller."""
    speeds = {
        precision: sum(1.0 / worker.chosen.seconds_per_image for worker in workers)
        for precision, workers in fitting.items()
    }
    order = list(speeds)
    for index, precision in enumerate(order):
        fastest = max(order[index:], key=lambda other: speeds[other])
        slower = speeds[fastest] / speeds[precision]
        if max_slowdown is None or slower <= max_slowdown:
            said[precision] = "taken: the best with which every worker fits"
            if index:
                said[precision] = f"taken: within {max_slowdown:g} times the fastest"
            return precision
        said[precision] = (
            f"{slower:.1f} times slower than {_words(fastest)}, which is more than "
            f"memory.max_slowdown {max_slowdown:g} allows"
        )
    raise AssertionError("the last has none that is smaller")


def _words(precision: Precision) -> str:
    return f"base {precision.base}, states {precision.states}"


def _nothing_fits(
    need: Need,
    asked: Asked,
    said: Mapping[Precision, str],
    misses: Sequence[tuple[Precision, Miss]],
    kept: Precision | None,
) -> str:
    if not misses:
        tried = "; ".join(f"{_words(one)}: {why}" for one, why in said.items())
        return f"No precision that the job allows can be had here. {tried}."
    precision, miss = min(
        misses, key=lambda entry: (entry[1].bytes, entry[1].room.peak(entry[1].sized.bytes))
    )
    setting, room = miss.sized.setting, miss.room
    width, height = need.bucket
    fixed = _fixed(asked, kept)
    others: dict[str, list[str]] = {}
    for one, why in said.items():
        if one not in dict(misses):
            others.setdefault(why, []).append(_words(one))
    also = "".join(f" {', '.join(which)}: {why}." for why, which in others.items())
    found = miss.sized.bytes
    smaller = "Choose a smaller data.resolution or network.rank, or leave this card out."
    if room.peak(found) <= room.budget:
        smaller = "Free host memory there, or leave this card out."
    return (
        f"{width}x{height} pixels do not fit {room.card.name}. Nearest is {_words(precision)}, "
        f"checkpointing {setting.checkpointing}, {setting.streamed:.0%} streamed, micro-batch "
        f"{setting.micro_batch}: {room.reason(found)} "
        f"({gib(asked.options.reserve_gib * GIB)} are kept in reserve).{also} "
        f"{fixed}{smaller}"
    )


def _fixed(asked: Asked, kept: Precision | None) -> str:
    """What could be tried if the job left it open."""
    options = asked.options
    words = {
        "base": options.base,
        "states": options.states,
        "checkpointing": options.checkpointing,
        "streaming": options.streaming,
        "host_states": options.host_states,
        "offload_inputs": options.offload_inputs,
        "vae_tiling": options.vae_tiling,
    }
    if kept:
        del words["base"], words["states"]
    given = [f"memory.{word}" for word, value in words.items() if value != "auto"]
    limits = [f"memory.{w}" for w in ("budget_gib", "host_gib") if getattr(options, w) is not None]
    found = f"Leave {', '.join(given)} on auto. " if given else ""
    return found + (f"Raise {', '.join(limits)}. " if limits else "")


def shares(plan: Plan) -> list[float]:
    """Each worker's part of a step's images, by predicted speed; they add up to 1."""
    speeds = [1.0 / worker.chosen.seconds_per_image for worker in plan.workers]
    return [speed / sum(speeds) for speed in speeds]
