"""What jobs need, made by hand from published sizes: no model is built and nothing is measured."""

from __future__ import annotations

from hypothesis import strategies as st

from raylora.base.units import GIB
from raylora.memory.card import Card
from raylora.memory.need import Curve, Line, ModelNeed, Need, StepNeed, UnitNeed, Work
from raylora.memory.setting import Checkpointing

MIB = 2**20


def curve(constant: float, per_image: float) -> Curve:
    """One line, in bytes."""
    return Curve((Line(int(constant), int(per_image)),))


def linear_unit(name: str, numbers: int, *, other: int = 0, columns: int = 3072) -> UnitNeed:
    """A block of linears, the largest of which is a quarter of it."""
    return UnitNeed(name, numbers, other, numbers // 4, numbers // columns)


def flux_need() -> Need:
    """FLUX.1-dev at 1024 pixels in bf16, with an adapter of rank 16 on every linear.

    11,901.4 M numbers, of which 19 double blocks have 339.8 M each and 38 single ones 141.6 M. An
    image's activations are 2.33 GiB with every block computed again, of which 1.5 GiB are what the
    blocks were given, and 33.6 GiB without. 74.4 TFLOP forward, of which 14.9 are attention's.
    """
    double, single = 339_831_296, 141_606_144
    blocks = [linear_unit(f"double.{i}", double) for i in range(19)]
    blocks += [linear_unit(f"single.{i}", single) for i in range(38)]
    outside = 11_901_408_320 - 19 * double - 38 * single
    matmul, attention = 59_512_255_414_272, 14_872_398_004_224

    def step(forwards: float, dynamic: float, inputs: float, launches: int) -> StepNeed:
        work = Work(int(forwards * matmul), int(forwards * attention), 10**11, launches)
        return StepNeed(curve(0, dynamic), int(inputs), work)

    again, plain, inputs = 2_501_195_264, 36_054_060_032, 1.5 * GIB
    steps: dict[Checkpointing, StepNeed] = {
        "none": step(2.2, plain, 0, 9_400),
        "mlp": step(2.6, 0.7 * plain, 0.5 * inputs, 10_500),
        "alternate": step(2.7, 0.5 * (plain + again), 0.5 * inputs, 11_700),
        "all": step(3.2, again, inputs, 14_000),
    }
    t5 = ModelNeed(
        tuple(linear_unit(f"t5.{i}", 193_000_000, columns=4096) for i in range(24)), 130_310_000
    )
    clip = ModelNeed((), 123_060_000)
    return Need(
        denoiser=ModelNeed(tuple(blocks), outside),
        text_encoders={"text_encoder": clip, "text_encoder_2": t5},
        vae=83_820_000,
        bucket=(1024, 1024),
        arithmetic="bf16",
        steps=steps,
        predict=step(1.0, 0.6 * GIB, 0, 3_000),
        encode=curve(0, 2.5 * GIB),
        decode=curve(0, 4.0 * GIB),
        decode_tiled=curve(0, 1.0 * GIB),
        read_text={"text_encoder": curve(0, 10 * MIB), "text_encoder_2": curve(0, 90 * MIB)},
        adapter_numbers=85_917_696,
    )


def card(
    gib: float,
    *,
    name: str = "card",
    free: bool = True,
    host_gib: float = 64.0,
    capability: tuple[int, int] | None = (8, 9),
    tflops: float = 165.0,
    copies: float = 22.0,
    dollars: float | None = None,
) -> Card:
    """A card with so much memory, all of it free where it was probed."""
    return Card(
        name=name,
        total_bytes=int(gib * GIB),
        free_bytes=int(gib * GIB) if free else None,
        host_bytes=int(host_gib * GIB),
        capability=capability,
        half_tflops=tflops,
        float_tflops=tflops / 2,
        bandwidth_gbs=1000.0,
        to_device_gbs=copies,
        to_host_gbs=copies,
        dollars_per_hour=dollars,
    )


def _steps(draw: st.DrawFn) -> dict[Checkpointing, StepNeed]:
    """Four kinds of checkpointing, each smaller and slower than the one before."""
    plain = draw(st.integers(20, 4000)) * MIB
    again = draw(st.integers(5, 20 + plain // MIB // 2)) * MIB
    inputs = draw(st.integers(0, again // MIB // 2)) * MIB
    constant = draw(st.integers(0, 200)) * MIB
    flops, launches = draw(st.integers(1, 60)) * 10**12, draw(st.integers(500, 20_000))
    parts: dict[Checkpointing, float] = {"none": 0.0, "mlp": 0.4, "alternate": 0.5, "all": 1.0}
    return {
        kind: StepNeed(
            curve(constant, plain + (again - plain) * part),
            int(inputs * part),
            Work(
                int(flops * (2 + part)),
                int(flops * (2 + part) / 5),
                int(flops / 500),
                int(launches * (2 + part)),
            ),
        )
        for kind, part in parts.items()
    }


@st.composite
def needs(draw: st.DrawFn) -> Need:
    """Any model: uneven blocks, from some megabytes to some gigabytes, with what it does."""
    sizes = draw(st.lists(st.integers(1, 400), min_size=1, max_size=8))
    blocks = [
        linear_unit(f"block.{i}", size * 2**19, other=size * 2**12) for i, size in enumerate(sizes)
    ]
    steps = _steps(draw)
    text = ModelNeed(
        tuple(linear_unit(f"text.{i}", draw(st.integers(1, 200)) * 2**18) for i in range(4)), 2**20
    )
    small = draw(st.integers(1, 300)) * MIB
    return Need(
        denoiser=ModelNeed(tuple(blocks), draw(st.integers(0, 2**24))),
        text_encoders={"text_encoder": text},
        vae=draw(st.integers(1, 80)) * 2**20,
        bucket=(1024, 1024),
        arithmetic="bf16",
        steps=steps,
        predict=StepNeed(curve(0, small), 0, Work(10**12, 10**11, 10**9, 500)),
        encode=curve(0, 3 * small),
        decode=curve(0, 4 * small),
        decode_tiled=curve(0, small),
        read_text={"text_encoder": curve(0, small // 4)},
        adapter_numbers=draw(st.integers(1, 200)) * 2**18,
    )
