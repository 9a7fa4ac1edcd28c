"""The way down ends, never turns back and never leaves what a job allows; the way up is checked."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import card, flux_need

from raylora.base.units import GIB
from raylora.memory.ladder import is_below, next_down, next_up
from raylora.memory.options import MemoryOptions
from raylora.memory.plan import Asked, CardPlan, make_plan
from raylora.memory.setting import CHECKPOINTINGS, Setting

SETTINGS = st.builds(
    Setting,
    checkpointing=st.sampled_from(CHECKPOINTINGS),
    streamed=st.floats(0, 1),
    offload=st.booleans(),
    micro_batch=st.integers(1, 64),
    host_states=st.booleans(),
)
WORDS = st.fixed_dictionaries(
    {},
    optional={
        "checkpointing": st.sampled_from(["auto", "all"]),
        "streaming": st.sampled_from(["auto", 0.3]),
        "offload_inputs": st.sampled_from(["auto", False]),
        "host_states": st.sampled_from(["auto", True]),
        "fused_backward": st.booleans(),
        "compile": st.booleans(),
    },
)


def plan_for(gib: float, **options: Any) -> CardPlan:
    asked = Asked(8, MemoryOptions(reserve_gib=0.0, **options), "bf16", bnb=True)
    return make_plan(flux_need(), asked, [card(gib)]).workers[0]


PLANS = {gib: plan_for(gib) for gib in (12, 24, 48, 80)}


def way_down(
    setting: Setting, options: MemoryOptions, plan: CardPlan | None = None
) -> list[Setting]:
    """Every setting from here to the last; fails where it does not end."""
    found = [setting]
    while (below := next_down(found[-1], options, plan)) is not None:
        found.append(below)
        assert len(found) < 100
    return found


@given(setting=SETTINGS, words=WORDS, gib=st.sampled_from([None, *PLANS]))
def test_the_way_down_ends_never_turns_back_and_stays_within_what_is_allowed(
    setting: Setting, words: dict[str, Any], gib: int | None
) -> None:
    options = MemoryOptions(**words)
    way = way_down(setting, options, PLANS[gib] if gib else None)
    assert len(set(way)) == len(way)
    fused = options.fused_backward
    streams = options.streaming == "auto" and not options.compile
    for before, after in pairwise(way):
        again = [CHECKPOINTINGS.index(one.checkpointing) for one in (before, after)]
        assert again[0] == again[1] or (again[0] < again[1] and options.checkpointing == "auto")
        assert again[0] == again[1] or not (options.compile and after.checkpointing == "mlp")
        assert before.streamed == after.streamed or (
            before.streamed < after.streamed <= 1 and streams
        )
        assert before.offload == after.offload or (
            after.offload and options.offload_inputs == "auto"
        )
        assert before.host_states == after.host_states or (
            after.host_states and options.host_states == "auto" and not fused
        )
        assert before.micro_batch == after.micro_batch or (
            1 <= after.micro_batch < before.micro_batch and not fused
        )


@given(setting=SETTINGS, gib=st.sampled_from([None, *PLANS]))
def test_the_last_setting_is_the_smallest_there_is(setting: Setting, gib: int | None) -> None:
    last = way_down(setting, MemoryOptions(), PLANS[gib] if gib else None)[-1]
    assert last == Setting("all", 1.0, True, 1, True)


@given(setting=SETTINGS)
def test_nothing_is_left_where_every_word_is_fixed(setting: Setting) -> None:
    options = MemoryOptions(
        checkpointing="all",
        streaming=0.5,
        offload_inputs=False,
        host_states=False,
        fused_backward=True,
    )
    assert next_down(setting, options) is None


def test_without_a_plan_the_cheapest_strategies_come_first() -> None:
    way = way_down(Setting(micro_batch=5), MemoryOptions())
    changed = [
        next(word for word in one.plain() if one.plain()[word] != other.plain()[word])
        for one, other in pairwise(way)
    ]
    expected = ["micro_batch"] * 2 + ["checkpointing"] * 3 + ["offload"] + ["streamed"] * 5
    assert changed == [*expected, "host_states"]


def test_offloading_waits_for_something_that_is_computed_again() -> None:
    options = MemoryOptions(checkpointing="none")
    way = way_down(Setting(), options)
    assert way[1] == Setting(streamed=0.2)
    assert way[2] == Setting(streamed=0.2, offload=True)


def test_with_a_plan_the_fastest_that_frees_a_tenth_comes_next() -> None:
    plan = PLANS[80]
    now = plan.chosen
    below = plan.known(next_down(now.setting, MemoryOptions(), plan) or now.setting)
    assert below is not None
    most = 0.9 * now.peaks["train"]
    assert below.peaks["train"] <= most
    order = list(CHECKPOINTINGS)
    free = [
        one
        for one in plan.rungs
        if one.peaks["train"] <= most
        and order.index(one.setting.checkpointing) >= order.index(now.setting.checkpointing)
        and one.setting.streamed >= now.setting.streamed
        and one.setting.micro_batch <= now.setting.micro_batch
    ]
    assert below.seconds_per_image == min(one.seconds_per_image for one in free)


def faster_rung(plan: CardPlan) -> tuple[CardPlan, Setting, int]:
    """A plan whose worker is in the slowest of its rungs, and what that was predicted to take."""
    slowest = plan.rungs[-1]
    return plan, slowest.setting, slowest.peaks["train"]


def test_as_predicted_a_slow_setting_goes_up_to_what_was_chosen() -> None:
    plan, setting, predicted = faster_rung(PLANS[48])
    above = next_up(plan, setting, predicted)
    assert above is not None
    found = plan.known(above)
    assert found is not None
    assert found.seconds_per_image == pytest.approx(plan.chosen.seconds_per_image)


def test_what_took_less_than_predicted_lets_a_setting_beyond_the_budget_be_tried() -> None:
    plan = PLANS[48]
    now = plan.chosen
    assert next_up(plan, now.setting, now.peaks["train"]) is None
    beyond = [one for one in plan.rungs if one.seconds_per_image < 0.97 * now.seconds_per_image]
    assert beyond
    saved = min(one.peak for one in beyond) - plan.budget_bytes
    above = next_up(plan, now.setting, now.peaks["train"] - saved)
    assert above in [one.setting for one in beyond]


def test_what_took_more_than_predicted_is_added_to_every_phase() -> None:
    plan, setting, predicted = faster_rung(PLANS[48])
    more = int(4 * GIB)
    above = next_up(plan, setting, predicted + more)
    assert above is not None
    found = plan.known(above)
    assert found is not None
    assert found.peak + more <= plan.budget_bytes
    assert next_up(plan, setting, predicted + int(100 * GIB)) is None


def test_a_setting_that_no_plan_knows_stays() -> None:
    assert next_up(PLANS[48], Setting("all", 0.123), GIB) is None


def test_a_preview_that_would_not_fit_keeps_a_faster_setting_away() -> None:
    plan, setting, predicted = faster_rung(PLANS[48])
    rungs = tuple(
        replace(one, peaks={**one.peaks, "preview": int(90 * GIB)})
        if one.setting != setting
        else one
        for one in plan.rungs
    )
    assert next_up(replace(plan, rungs=rungs), setting, predicted) is None


@pytest.mark.parametrize(
    "back",
    [
        {"checkpointing": "mlp"},
        {"streamed": 0.4},
        {"offload": False},
        {"host_states": False},
        {"micro_batch": 3},
    ],
)
def test_what_takes_one_strategy_back_is_not_below_whatever_it_adds(back: dict[str, Any]) -> None:
    now = Setting("alternate", 0.5, True, 2, True)
    every = Setting("all", 1.0, True, 1, True)
    assert is_below(every, now, MemoryOptions())
    assert not is_below(every.but(**back), now, MemoryOptions())
