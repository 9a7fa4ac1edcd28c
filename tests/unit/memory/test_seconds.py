"""The roofline: each of its streams alone, by hand, and how they hide one another."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import card, flux_need

from raylora.memory.need import Work
from raylora.memory.peaks import Carried, hold, step_of
from raylora.memory.seconds import (
    Load,
    Rates,
    load_of,
    micro_batch_seconds,
    move_seconds,
    seconds_per_image,
    training_seconds,
)
from raylora.memory.setting import Checkpointing, Precision, Setting

FULL = Rates(
    matmul=0.5,
    attention=0.25,
    traffic=0.5,
    launch_seconds=0.0,
    kernel_seconds=0.0,
    copies=1.0,
    exposed=0.0,
)
IDLE = Load(Work(0, 0, 0, 0), True, 0, 0, 0, 0)
CARD = replace(card(24, tflops=100.0, copies=20.0), bandwidth_gbs=1000.0)


def test_products_attention_and_traffic_add_up() -> None:
    load = replace(IDLE, work=Work(10**13, 10**12, 10**11, 0))
    # 10 TF at 50, 1 TF at 25 TFLOP/s, and 100 GB at 500 GB/s.
    assert micro_batch_seconds(load, 1, CARD, FULL) == pytest.approx(0.2 + 0.04 + 0.2)
    assert micro_batch_seconds(load, 3, CARD, FULL) == pytest.approx(3 * 0.44)


def test_float32_computes_at_its_own_rate() -> None:
    load = replace(IDLE, work=Work(10**13, 0, 0, 0), half=False)
    assert micro_batch_seconds(load, 1, CARD, FULL) == pytest.approx(0.4)


def test_a_small_step_takes_what_the_host_takes_to_start_it() -> None:
    rates = replace(FULL, launch_seconds=10e-6, kernel_seconds=2e-6)
    load = replace(IDLE, work=Work(10**10, 0, 0, 5000))
    assert micro_batch_seconds(load, 1, CARD, rates) == pytest.approx(0.05)
    large = replace(load, work=Work(10**13, 0, 0, 5000))
    assert micro_batch_seconds(large, 1, CARD, rates) == pytest.approx(0.2 + 0.01)


def test_streaming_hides_behind_computing_but_for_one_unit() -> None:
    work = Work(10**13, 0, 0, 0)
    hidden = Load(work, True, 0, 2 * 10**9, 10**8, 0)
    assert micro_batch_seconds(hidden, 1, CARD, FULL) == pytest.approx(0.2 + 0.005)
    bound = Load(work, True, 0, 10**10, 10**8, 0)
    assert micro_batch_seconds(bound, 1, CARD, FULL) == pytest.approx(0.5 + 0.005)


def test_a_training_step_copies_streamed_weights_twice() -> None:
    need, precision = flux_need(), Precision("bf16")
    held = hold(need.denoiser, precision, 0.5)
    step = step_of(need, held, "all", 1)
    assert load_of(precision, held, step, offload=False).streamed_bytes == 2 * held.streamed_bytes


def test_bringing_weights_back_moves_them_once_a_pass() -> None:
    need, precision = flux_need(), Precision("bf16", "int8")
    held = hold(need.denoiser, precision, 0.0)
    rates = replace(FULL, unpack_8bit=1.0)
    numbers = sum(unit.linear_numbers for unit in need.denoiser.units)
    rows = sum(unit.linear_rows for unit in need.denoiser.units)
    once = numbers + 4 * rows + 2 * numbers  # packed with scales, and bf16
    passes_of: dict[Checkpointing, int] = {"none": 2, "all": 3}
    for checkpointing, passes in passes_of.items():
        step = step_of(need, held, checkpointing, 1)
        load = load_of(precision, held, step, offload=False, rates=rates)
        assert load.unpacked_bytes == passes * once


def test_offloaded_inputs_go_and_come() -> None:
    there = replace(CARD, to_device_gbs=20.0, to_host_gbs=10.0)
    load = replace(IDLE, inputs_bytes=10**9)
    assert micro_batch_seconds(load, 2, there, FULL) == pytest.approx(2 / 10)
    exposed = replace(FULL, exposed=0.5)
    assert micro_batch_seconds(load, 2, there, exposed) == pytest.approx(0.2 + 0.5 * (0.1 + 0.2))


def test_the_optimizer_moves_on_the_device_or_on_the_host() -> None:
    carried = Carried(8, False, False, False, False, 0)
    need = replace(flux_need(), adapter_numbers=10**9)
    moved = 10**9 * (12 + 16)
    on_device = move_seconds(need, carried, CARD, host_states=False, rates=FULL)
    assert on_device == pytest.approx(moved / 500e9)
    rates = replace(FULL, host_gbs=10.0)
    on_host = move_seconds(need, carried, CARD, host_states=True, rates=rates)
    assert on_host == pytest.approx(moved / 10e9 + 3 * 4e9 / 20e9)


def test_a_step_is_its_micro_batches_and_the_optimizer() -> None:
    load = replace(IDLE, work=Work(10**13, 0, 0, 1000))
    rates = replace(FULL, kernel_seconds=1e-5)
    found = seconds_per_image(load, 4, 10, 0.5, CARD, rates)
    # 4 + 4 + 2 images of 0.2 s, three times 0.01 s of operations, one move.
    assert found == pytest.approx((10 * 0.2 + 3 * 0.01 + 0.5) / 10)


@given(
    flops=st.integers(0, 10**14),
    launches=st.integers(0, 20_000),
    streamed=st.integers(0, 10**11),
    inputs=st.integers(0, 10**10),
    images=st.integers(1, 8),
)
def test_more_images_together_are_never_slower_an_image_and_a_better_card_never_slower(
    flops: int, launches: int, streamed: int, inputs: int, images: int
) -> None:
    load = Load(Work(flops, flops // 5, flops // 100, launches), True, 0, streamed, 10**8, inputs)
    one = micro_batch_seconds(load, images, CARD)
    assert micro_batch_seconds(load, images + 1, CARD) / (images + 1) <= one / images + 1e-12
    for better in (
        replace(CARD, half_tflops=200.0),
        replace(CARD, bandwidth_gbs=2000.0),
        replace(CARD, to_device_gbs=40.0),
        replace(CARD, to_host_gbs=40.0),
    ):
        assert micro_batch_seconds(load, images, better) <= one


def test_published_speeds_of_flux_are_met_within_a_factor_of_two() -> None:
    # SimpleTuner's quickstart: 3.5 s a step at 1024 pixels on a 4090, nf4, computed again.
    found = training_seconds(flux_need(), Precision("bf16", "nf4"), Setting("all"), card(24))
    assert 3.5 / 2 < found < 3.5 * 2
