"""Bytes of each phase, against published figures and sums that were worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from needs import curve, flux_need, linear_unit

from raylora.base.units import GIB
from raylora.memory.need import ModelNeed, Need, StepNeed, Work
from raylora.memory.peaks import Bytes, Carried, bytes_of, encoding_of, hold, step_of
from raylora.memory.setting import BaseKind, Precision, Setting

PLAIN = Carried(
    state_bytes=8,
    ema=False,
    exact_sums=False,
    fused=False,
    live_encoders=False,
    preview_images=0,
)
WORK = Work(10**12, 10**11, 10**9, 1000)


def small_need(arithmetic: str = "bf16") -> Need:
    """Four blocks of 1000 numbers, 100 outside, 50 trained; activations in round bytes."""
    return Need(
        denoiser=ModelNeed(tuple(linear_unit(f"{i}", 900, other=100) for i in range(4)), 100),
        text_encoders={"text_encoder": ModelNeed((), 300), "text_encoder_2": ModelNeed((), 30)},
        vae=70,
        bucket=(64, 64),
        arithmetic=arithmetic,
        steps={
            "none": StepNeed(curve(1000, 8000), 0, WORK),
            "all": StepNeed(curve(1000, 3000), 2000, WORK),
        },
        predict=StepNeed(curve(500, 600), 0, WORK),
        encode=curve(0, 7000),
        decode=curve(0, 9000),
        decode_tiled=curve(0, 4000),
        read_text={"text_encoder": curve(0, 40), "text_encoder_2": curve(0, 4)},
        adapter_numbers=50,
        adapter_constants=5,
    )


def sized(
    need: Need, carried: Carried = PLAIN, setting: Setting | None = None, base: BaseKind = "full"
) -> Bytes:
    asked = setting or Setting()
    precision = Precision(need.arithmetic, base)  # type: ignore[arg-type]
    return bytes_of(need, carried, hold(need.denoiser, precision, asked.streamed), asked)


@pytest.mark.parametrize(
    ("base", "published"),
    [
        ("full", (25.0, 20.7, 15.2, 9.7, 6.4)),
        ("int8", (14.0, 11.8, 9.1, 6.3, 4.7)),
        ("nf4", (9.1, 7.9, 6.4, 4.8, 3.9)),
    ],
)
def test_flux_with_streamed_blocks_takes_what_was_worked_out_for_it(
    base: BaseKind, published: tuple[float, ...]
) -> None:
    # There gradients came one by one and were few at the peak; ours stand there all the time.
    need, carried = flux_need(), replace(PLAIN, state_bytes=2, fused=True)
    brought_back = 0.0 if base == "full" else 339_831_296 / 4 * 2 / GIB  # not counted there
    for share, expected in zip((0.0, 0.25, 0.5, 0.75, 0.9), published, strict=True):
        setting = Setting("all", streamed=share)
        found = sized(need, carried, setting, base).train / GIB - brought_back
        # A block is 0.63 GiB in full, and a share is met within half of one.
        block = {"full": 0.63, "int8": 0.32, "nf4": 0.18}[base]
        assert found == pytest.approx(expected, abs=0.1 + (block / 2 if share else 0))


def test_without_any_strategy_all_terms_add_up() -> None:
    weights, adapter, gradients, states = 4100 * 2, 55 * 4, 50 * 4, 50 * 8
    assert sized(small_need()).train == weights + adapter + gradients + states + 1000 + 8000
    three = Setting(micro_batch=3)
    assert sized(small_need(), setting=three).train - sized(small_need()).train == 2 * 8000


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"ema": True}, 50 * 4),
        ({"exact_sums": True}, 50 * 8),
        ({"fused": True}, -50 * 4),
        ({"state_bytes": 2}, -50 * 6),
    ],
)
def test_what_a_run_carries_takes_its_bytes(changes: dict[str, object], difference: int) -> None:
    before, after = sized(small_need()), sized(small_need(), replace(PLAIN, **changes))  # type: ignore[arg-type]
    assert after.train - before.train == difference


def test_states_on_the_host_leave_the_device_and_take_host_memory() -> None:
    before, after = sized(small_need()), sized(small_need(), setting=Setting(host_states=True))
    assert before.train - after.train == 50 * 8
    assert (before.host, after.host) == (0, 50 * (4 + 4 + 8))


def test_float64_training_has_an_adapter_of_float64() -> None:
    found = sized(small_need("fp64")).train
    assert found == 4100 * 8 + 55 * 8 + 50 * 8 + 50 * 8 + 9000


def test_streamed_blocks_leave_and_two_slots_of_the_ring_come() -> None:
    half = hold(small_need().denoiser, Precision("bf16"), 0.5)
    assert (half.streamed_bytes, half.resident_bytes) == (2 * 2000, 2 * 2000 + 200)
    assert half.bytes == half.resident_bytes + 2 * 2000
    setting = Setting("all", streamed=0.5)
    assert sized(small_need(), setting=setting).host == 4000


def test_a_held_base_brings_back_one_linear() -> None:
    need = small_need()
    full, held = sized(need), sized(need, base="int8")
    # A row of these takes none of the 900 numbers: columns are 3072.
    assert full.train - held.train == 4 * 900 * (2 - 1) - 225 * 2


def test_streamed_blocks_are_computed_again_where_the_rest_is_not() -> None:
    need = small_need()
    every = step_of(need, hold(need.denoiser, Precision("bf16"), 1.0), "none", 2)
    assert (every.dynamic_bytes, every.inputs_bytes) == (1000 + 2 * 3000, 2000)
    assert every.again_share == 1
    half = step_of(need, hold(need.denoiser, Precision("bf16"), 0.5), "none", 2)
    # Half of what each keeps, and one block that is computed again while the others hold theirs.
    assert half.dynamic_bytes == (17000 + 7000) / 2 + 0.5 * (7000 - 2 * 2000)
    assert half.inputs_bytes == 1000


def test_offloaded_inputs_leave_all_but_those_of_four_blocks() -> None:
    blocks = tuple(linear_unit(f"{i}", 900, other=100) for i in range(16))
    need = replace(small_need(), denoiser=ModelNeed(blocks, 100))
    setting = Setting("all", micro_batch=2)
    before, after = sized(need, setting=setting), sized(need, setting=setting.but(offload=True))
    assert before.train - after.train == 2 * 2000 * (1 - 4 / 16)
    assert after.host == 2 * 2000


def test_live_encoders_stay_in_float32_and_encode_within_a_step() -> None:
    live = replace(PLAIN, live_encoders=True)
    standing = 4 * (70 + 300 + 30)
    assert sized(small_need(), live).train - sized(small_need()).train == standing
    large = replace(small_need(), encode=curve(0, 20_000))
    extra = 20_000 - 9000
    assert sized(large, live).train - sized(small_need()).train == standing + extra


def test_a_text_encoder_that_is_trained_stays_in_the_arithmetic() -> None:
    need = replace(small_need(), trains_text=("text_encoder",))
    assert sized(need).train - sized(small_need()).train == 300 * 2


def test_previews_bring_the_vae_for_decoding_alone() -> None:
    drawing = replace(PLAIN, preview_images=2)
    found = sized(small_need(), drawing)
    standing = found.train - 9000
    assert found.preview == standing + 70 * 4 + 9000
    assert found.preview_tiled == standing + 70 * 4 + 4000
    assert sized(small_need()).preview == 0
    wide = replace(small_need(), predict=StepNeed(curve(0, 6000), 0, WORK))
    assert sized(wide, drawing).preview_tiled == standing + 2 * 6000


def test_encoding_takes_the_largest_of_what_comes_one_at_a_time() -> None:
    assert encoding_of(small_need(), 10**6).peak == 70 * 4 + 7000
    large = replace(small_need(), encode=curve(0, 0))
    assert encoding_of(large, 10**6).peak == 300 * 4 + 16 * 40  # captions, sixteen together


def test_a_text_encoder_that_does_not_fit_is_streamed_and_then_does() -> None:
    whole = encoding_of(flux_need(), int(24 * GIB))
    assert whole.streamed == ()
    captions = 16 * 90 / 1024  # the hand-made need's 90 MiB each, read together
    assert whole.peak / GIB == pytest.approx(4 * 4.7623e9 / GIB + captions, abs=0.15)
    small = encoding_of(flux_need(), int(8 * GIB))
    assert small.streamed == ("text_encoder_2",)
    assert small.peak <= 8 * GIB
    # No more than has to lie there: T5 less what the card can hold.
    assert 9 * GIB < small.host < 14 * GIB


def test_of_a_large_adapter_copies_are_what_is_left_of_training_and_saving() -> None:
    large, averaged = replace(small_need(), adapter_numbers=10_000), replace(PLAIN, ema=True)
    copy = 10_000 * 4
    standing = 4100 * 2 + (10_005 + 10_000) * 4 + 10_000 * 8
    plain, kept = sized(large), sized(large, averaged)
    # One more is what several workers add up, or what is read back of the file.
    assert (plain.train, plain.save) == (standing + copy, standing + copy + 500 + 600)
    # The average itself, and the values whose place it takes in the file.
    assert (kept.train - plain.train, kept.save - plain.save) == (copy, 2 * copy)
