"""Plans: what they promise, against trying everything, for any need, card and budget."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from needs import card, curve, flux_need, needs

from raylora.base.units import GIB
from raylora.memory.candidates import SHARES, library_bytes
from raylora.memory.card import Card
from raylora.memory.cards import KNOWN, card_named
from raylora.memory.need import Need
from raylora.memory.options import MemoryOptions
from raylora.memory.peaks import bytes_of, encoding_of, hold, step_of
from raylora.memory.plan import (
    Asked,
    Plan,
    PlanError,
    budget_bytes,
    host_budget_bytes,
    make_plan,
    shares,
)
from raylora.memory.seconds import RATES, load_of, move_seconds, seconds_per_image
from raylora.memory.setting import Precision, Setting

ORDER = [(base, states) for base in ("full", "int8", "fp8", "nf4") for states in ("full", "8bit")]


def asked_for(options: dict[str, Any] | None = None, **changes: Any) -> Asked:
    usual: dict[str, Any] = {
        "images_per_step": 4,
        "arithmetic": "bf16",
        "state_bytes": 8.0,
        "state_bytes_8bit": 2.0,
        "bnb": True,
        "previews": True,
    }
    given = {"reserve_gib": 0.0, **(options or {})}
    return Asked(options=MemoryOptions(**given), **{**usual, **changes})


def everything(need: Need, asked: Asked, one: Card) -> Iterator[tuple[Any, Setting, float]]:
    """(precision, setting, seconds an image) of all that fits a lone card, by trying it all."""
    options = asked.options
    budget = int(one.free_bytes or 0) - int(options.reserve_gib * GIB) - library_bytes(one)
    host = int(0.7 * one.host_bytes) if options.host_gib is None else int(options.host_gib * GIB)
    encoding = encoding_of(need, budget)
    if encoding.peak > budget or encoding.host > host:
        return
    most = 1 if asked.exact_sums else min(asked.images_per_step, options.max_micro_batch or 8)
    words = itertools.product(
        need.steps if options.checkpointing == "auto" else [options.checkpointing],
        SHARES if options.streaming == "auto" else [options.streaming],
        [False, True] if options.offload_inputs == "auto" else [options.offload_inputs],
        [False, True] if options.host_states == "auto" else [options.host_states],
    )
    allowed = [one for one in words if not (one[2] and one[0] == "none" and one[1] == 0)]
    for base, states in ORDER:
        if options.base not in ("auto", base) or options.states not in ("auto", states):
            continue
        precision = Precision("bf16", base, states)  # type: ignore[arg-type]
        carried = asked.carried(precision)
        for checkpointing, share, offload, host_states in allowed:
            held = hold(need.denoiser, precision, share)
            step = step_of(need, held, checkpointing, 1)
            load = load_of(precision, held, step, offload=offload)
            moving = move_seconds(need, carried, one, host_states=host_states)
            if offload and not held.streamed and checkpointing == "none":
                continue
            for together in range(1, most + 1):
                setting = Setting(checkpointing, share, offload, together, host_states)
                found = bytes_of(need, carried, held, setting)
                tiles = options.vae_tiling
                preview = found.preview
                if tiles is True or (tiles == "auto" and preview > budget):
                    preview = found.preview_tiled
                if max(found.train, found.validate, found.save, preview) > budget:
                    continue
                if found.host > host:
                    continue
                images = asked.images_per_step
                yield (
                    (base, states),
                    setting,
                    seconds_per_image(load, together, images, moving, one),
                )


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "base": st.sampled_from(["full", "int8", "nf4"]),
        "states": st.sampled_from(["full", "8bit"]),
        "checkpointing": st.sampled_from(["none", "mlp", "alternate", "all"]),
        "streaming": st.sampled_from([0.0, 0.35, 1.0]),
        "offload_inputs": st.just(False),
        "host_states": st.booleans(),
        "vae_tiling": st.booleans(),
        "max_micro_batch": st.integers(1, 3),
        "reserve_gib": st.sampled_from([0.0, 0.1]),
        "host_gib": st.sampled_from([0.2, 4.0]),
    },
)
CARDS = st.builds(
    card,
    st.just(1.0),
    host_gib=st.floats(0.5, 16.0),
    tflops=st.floats(5.0, 500.0),
    copies=st.floats(2.0, 50.0),
)
TIGHT = st.floats(0, 1).map(lambda share: 0.02 + 0.98 * share**2)


def sized_for(need: Need, one: Card, tight: float) -> Card:
    """The card with memory between a little less than the least and a little more than the most
    that the need can take."""
    precisions = Precision("bf16", "nf4", "8bit"), Precision("bf16")
    ways = Setting("all", 1.0, True, 1, True), Setting(micro_batch=4)
    least, most = (
        bytes_of(need, asked_for().carried(p), hold(need.denoiser, p, way.streamed), way)
        for p, way in zip(precisions, ways, strict=True)
    )
    low = 0.99 * max(least.train, least.preview_tiled, least.save, encoding_of(need, 0).peak)
    high = 1.05 * max(most.train, most.preview, most.save)
    free = int(low + tight * max(0, high - low)) + library_bytes(one)
    return replace(one, free_bytes=free)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    need=needs(),
    one=CARDS,
    tight=TIGHT,
    options=OPTIONS,
    images=st.integers(1, 3),  # the micro-batches that a plan thinks of have no gaps up to 4
    exact=st.booleans(),
)
def test_a_plan_fits_is_the_best_precision_and_nothing_that_fits_is_faster(
    need: Need, one: Card, tight: float, options: dict[str, Any], images: int, exact: bool
) -> None:
    one = sized_for(need, one, tight)
    asked = asked_for(options, images_per_step=images, exact_sums=exact)
    fits = list(everything(need, asked, one))
    if not fits:
        with pytest.raises(PlanError, match=r"1024x1024 pixels do not fit"):
            make_plan(need, asked, [one])
        return
    plan = make_plan(need, asked, [one])
    worker, chosen = plan.workers[0], plan.workers[0].chosen
    assert chosen.reason == ""
    assert chosen.peak <= worker.budget_bytes
    assert chosen.host_bytes <= worker.host_budget_bytes
    best = min((ORDER.index(precision) for precision, *_ in fits))
    assert (plan.precision.base, plan.precision.states) == ORDER[best]
    within = {setting: s for precision, setting, s in fits if precision == ORDER[best]}
    assert chosen.setting in within
    # A host rounds the optimizer's step in its own way, so it is asked where nothing else fits.
    plain = {setting: s for setting, s in within.items() if not setting.host_states} or within
    assert chosen.setting in plain
    assert chosen.seconds_per_image == pytest.approx(min(plain.values()), rel=1e-9)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(need=needs(), one=CARDS, tight=TIGHT, more=st.floats(1.0, 3.0), host=st.floats(1.0, 3.0))
def test_more_memory_never_gives_a_worse_precision_or_a_slower_plan(
    need: Need, one: Card, tight: float, more: float, host: float
) -> None:
    one = sized_for(need, one, tight)
    asked = asked_for(images_per_step=6)
    try:
        before = make_plan(need, asked, [one])
    except PlanError:
        assume(False)
        raise
    larger = replace(
        one,
        free_bytes=int((one.free_bytes or 0) * more),
        host_bytes=int(one.host_bytes * host),
    )
    after = make_plan(need, asked, [larger])
    rank = [ORDER.index((plan.precision.base, plan.precision.states)) for plan in (before, after)]
    assert rank[1] <= rank[0]
    if rank[0] == rank[1]:
        slow, fast = (plan.workers[0].chosen for plan in (before, after))
        assert fast.setting.host_states <= slow.setting.host_states
        if fast.setting.host_states == slow.setting.host_states:
            assert fast.seconds_per_image <= slow.seconds_per_image * (1 + 1e-12)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(need=needs(), cards=st.lists(st.tuples(CARDS, TIGHT), min_size=2, max_size=3))
def test_a_fleet_takes_the_first_precision_with_which_each_of_its_cards_fits_alone(
    need: Need, cards: list[tuple[Card, float]]
) -> None:
    fleet = [sized_for(need, one, tight) for one, tight in cards]

    def fits(base: str, states: str, one: Card) -> bool:
        try:
            make_plan(need, asked_for({"base": base, "states": states}, images_per_step=1), [one])
        except PlanError:
            return False
        return True

    all_fit = [words for words in ORDER if all(fits(*words, one) for one in fleet)]
    if not all_fit:
        with pytest.raises(PlanError):
            make_plan(need, asked_for(images_per_step=1), fleet)
        return
    plan = make_plan(need, asked_for(images_per_step=1), fleet)
    assert (plan.precision.base, plan.precision.states) == all_fit[0]
    assert [worker.card for worker in plan.workers] == fleet
    assert all(worker.chosen.reason == "" for worker in plan.workers)


def lone(gib: float, options: dict[str, Any] | None = None, **changes: Any) -> Plan:
    return make_plan(flux_need(), asked_for(options, **changes), [card(gib)])


def test_a_large_card_does_nothing_special() -> None:
    plan = lone(141)
    assert plan.precision == Precision("bf16")
    assert plan.workers[0].chosen.setting.but(micro_batch=1) == Setting()
    assert plan.workers[0].streamed_bytes == 0


def test_no_card_of_8_gib_or_more_is_refused_flux_at_1024_pixels() -> None:
    need, asked = flux_need(), asked_for({"reserve_gib": 0.5}, preview_images=1)
    for name in KNOWN:
        known = card_named(name)
        half = replace(asked, arithmetic="bf16" if known.bf16 else "fp16")
        plan = make_plan(replace(need, arithmetic=half.arithmetic), half, [known])
        assert plan.workers[0].chosen.reason == ""


def test_words_of_the_job_are_kept() -> None:
    options = {"base": "nf4", "checkpointing": "all", "streaming": 0.25, "max_micro_batch": 2}
    plan = lone(24, {**options, "offload_inputs": True, "host_states": True})
    assert plan.precision.base == "nf4"
    chosen = plan.workers[0].chosen.setting
    assert chosen.but(micro_batch=1) == Setting("all", 0.25, True, 1, True)
    assert chosen.micro_batch <= 2


def test_compiled_blocks_stay_on_the_device_and_are_computed_again_whole() -> None:
    asked = Asked(4, MemoryOptions(compile=True), "bf16", bnb=True)
    (worker,) = make_plan(flux_need(), asked, [card(24)]).workers
    settings = [one.setting for one in (worker.chosen, *worker.candidates, *worker.rungs)]
    assert {one.streamed for one in settings} == {0.0}
    assert {one.checkpointing for one in settings} == {"none", "alternate", "all"}


def test_every_kind_of_setting_is_told_with_why_it_was_not_taken() -> None:
    worker = lone(24).workers[0]
    kinds = {
        (one.setting.checkpointing, one.setting.streamed > 0, one.setting.offload)
        for one in worker.candidates
    }
    # Four kinds of checkpointing, streamed or not, offloaded or not, but nothing of nothing.
    assert len(kinds) == 4 * 2 * 2 - 1
    assert worker.candidates[0].setting == worker.chosen.setting
    plain = next(one for one in worker.candidates if one.setting.but(micro_batch=1) == Setting())
    assert plain.reason.startswith("train needs 5")
    assert plain.reason.endswith("of 24.00 GiB")


def test_rungs_go_from_the_fastest_to_the_smallest() -> None:
    rungs = lone(24, images_per_step=16).workers[0].rungs
    seconds, peaks = [r.seconds_per_image for r in rungs], [r.peak for r in rungs]
    assert seconds == sorted(seconds)
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks) > 3


def test_an_unprobed_card_has_less_than_its_total() -> None:
    options = MemoryOptions(reserve_gib=0.5)
    unprobed = replace(card(24), free_bytes=None)
    expected = (24 * 0.985 - 0.55 - 0.5) * GIB
    assert budget_bytes(unprobed, options) == pytest.approx(expected, abs=4)
    assert budget_bytes(card(22), options) == int(21.5 * GIB)
    assert budget_bytes(card(22), MemoryOptions(budget_gib=8, reserve_gib=1)) == 7 * GIB
    limited = replace(unprobed, capability=None, total_bytes=GIB, limited=True)
    assert budget_bytes(limited, MemoryOptions(budget_gib=1, reserve_gib=0)) == GIB


def test_host_memory_is_seven_tenths_of_what_is_free_or_as_the_job_says() -> None:
    assert host_budget_bytes(card(8, host_gib=10), MemoryOptions()) == int(7 * GIB)
    assert host_budget_bytes(card(8, host_gib=10), MemoryOptions(host_gib=9)) == 9 * GIB


def test_without_host_memory_the_base_is_made_smaller_rather_than_streamed() -> None:
    need = replace(flux_need(), text_encoders={}, read_text={})
    asked = asked_for(images_per_step=1)
    assert make_plan(need, asked, [card(16)]).precision.base == "full"
    plan = make_plan(need, asked, [card(16, host_gib=1)])
    assert plan.precision.base == "int8"
    assert "host memory" in dict(plan.precisions)[Precision("bf16")]


def test_a_smaller_base_is_taken_only_where_the_job_limits_the_slowdown() -> None:
    slow = card(10, copies=2.0)
    need, asked = flux_need(), asked_for(images_per_step=1)
    kept = make_plan(need, asked, [slow])
    assert kept.precision.base == "full"
    limited = make_plan(need, asked_for({"max_slowdown": 1.5}, images_per_step=1), [slow])
    assert limited.precision.base != "full"
    speed = [1 / plan.workers[0].chosen.seconds_per_image for plan in (kept, limited)]
    assert speed[1] > 1.5 * speed[0]
    assert "times slower" in dict(limited.precisions)[Precision("bf16")]
    generous = asked_for({"max_slowdown": 1000}, images_per_step=1)
    assert make_plan(need, generous, [slow]).precision == kept.precision


def test_a_resumed_run_keeps_its_precision() -> None:
    kept = Precision("bf16", "int8", "8bit")
    plan = make_plan(flux_need(), asked_for(), [card(141)], kept=kept)
    assert plan.precision == kept
    assert plan.precisions == ((kept, "kept from the run's start"),)
    with pytest.raises(PlanError, match=r"memory.base is full, and the run was begun with int8"):
        make_plan(flux_need(), asked_for({"base": "full"}), [card(141)], kept=kept)
    with pytest.raises(PlanError, match=r"training.precision is bf16, .* begun with fp16"):
        make_plan(flux_need(), asked_for(), [card(141)], kept=replace(kept, arithmetic="fp16"))


def test_cards_without_bf16_are_named() -> None:
    cards = [card(24), card_named("T4"), card_named("V100-16G")]
    with pytest.raises(PlanError, match=r"bf16, which T4, V100-16G cannot.*precision: fp16"):
        make_plan(flux_need(), asked_for(), cards)
    need = replace(flux_need(), arithmetic="fp16")
    assert make_plan(need, asked_for(arithmetic="fp16", preview_images=1), cards)


def test_nf4_and_8_bit_states_need_their_package_and_an_optimizer_that_has_them() -> None:
    with pytest.raises(PlanError, match=r"nf4 needs bitsandbytes: pip install"):
        lone(24, {"base": "nf4"}, bnb=False)
    with pytest.raises(PlanError, match=r"no other form with states of 8 bits"):
        lone(24, {"states": "8bit"}, state_bytes_8bit=None)
    plan = lone(141, bnb=False)
    said = {(p.base, p.states): why for p, why in plan.precisions}
    assert "bitsandbytes" in said["nf4", "full"]
    assert said["int8", "full"] == "not needed"


def test_what_does_not_fit_is_told_with_the_nearest_and_what_to_change() -> None:
    options = {"checkpointing": "none", "streaming": 0.0, "budget_gib": 5, "reserve_gib": 0.5}
    with pytest.raises(PlanError) as caught:
        lone(24, {**options, "host_states": False})
    said = str(caught.value)
    assert "Nearest is base nf4, states 8bit, checkpointing none, 0% streamed" in said
    assert "train needs 4" in said
    assert "of 4.50 GiB (0.50 GiB are kept in reserve)" in said
    assert "memory.checkpointing, memory.streaming, memory.host_states on auto" in said
    assert "Raise memory.budget_gib." in said


def test_previews_that_do_not_fit_whole_are_drawn_in_tiles() -> None:
    need = replace(flux_need(), decode=curve(0, 60 * GIB))
    plan = make_plan(need, asked_for(images_per_step=1), [card(24)])
    assert plan.workers[0].tiled
    assert plan.workers[0].chosen.peaks["preview"] < 24 * GIB
    with pytest.raises(PlanError, match=r"preview needs"):
        make_plan(need, asked_for({"vae_tiling": False}), [card(24)])
    none = make_plan(need, asked_for(previews=False), [card(24)])
    assert "preview" not in none.workers[0].chosen.peaks


def test_a_fused_backward_takes_all_images_of_a_step_together() -> None:
    options = {"fused_backward": True}
    plan = lone(141, options, fused=True, images_per_step=3)
    assert {one.setting.micro_batch for one in plan.workers[0].candidates} == {3}
    assert not any(one.setting.host_states for one in plan.workers[0].candidates)


def test_no_worker_takes_more_images_together_than_a_step_has_for_it() -> None:
    fast, slow = card(141, tflops=300.0), card(141, tflops=100.0)
    plan = make_plan(flux_need(), asked_for(images_per_step=8), [fast, slow])
    together = [max(c.setting.micro_batch for c in w.candidates + w.rungs) for w in plan.workers]
    assert together == [6, 2]


def test_speeds_make_shares() -> None:
    cards = [card(141, tflops=400.0), card(141, tflops=100.0)]
    plan = make_plan(flux_need(), asked_for(images_per_step=8), cards)
    fast, slow = (1 / worker.chosen.seconds_per_image for worker in plan.workers)
    assert shares(plan) == [fast / (fast + slow), slow / (fast + slow)]


def test_a_fleet_of_twelve_different_cards_is_planned_in_a_moment() -> None:
    cards = [card_named(name) for name in KNOWN if KNOWN[name].capability >= (8, 0)][:12]
    need, asked = flux_need(), asked_for({"reserve_gib": 0.5}, images_per_step=96)
    taken = []
    for _ in range(3):
        began = time.process_time()
        make_plan(need, asked, cards)
        taken.append(time.process_time() - began)
    assert min(taken) < 0.3


def test_states_stay_on_the_device_though_a_host_would_be_faster() -> None:
    rates = replace(RATES, host_gbs=1e9)
    plan = make_plan(flux_need(), asked_for(), [card(141, copies=1e6)], rates=rates)
    (worker,) = plan.workers
    assert not worker.chosen.setting.host_states
    assert any(
        one.setting.host_states and one.seconds_per_image < worker.chosen.seconds_per_image
        for one in worker.candidates
    )
