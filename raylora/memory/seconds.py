"""Seconds of a step, from what is computed and moved and what a card can do: a roofline.

A step takes what its slowest stream takes: the host, which starts each operation; the device, which
computes and reads and writes; the copies, which come and go meanwhile. It is used to choose between
settings and to tell people what to expect; two measured steps replace it where there is a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from raylora.memory.card import Card
from raylora.memory.need import Need, Work
from raylora.memory.peaks import Carried, Held, Step, hold, step_of, value_bytes
from raylora.memory.setting import Precision, Setting


@dataclass(frozen=True)
class Rates:
    """What of a card's figures is reached, and what each operation costs besides.

    Fitted to recorded steps on one H100, which they meet within a quarter; steps that are not
    recorded took up to 1.8 times what they say (benchmarks/results). That other cards reach the
    same shares is assumed.

    Attributes:
        matmul, attention, traffic: share of the card's figure that products of matrices, attention
            and all other operations reach.
        launch_seconds: of the host, an operation; measured beside that H100, and less where
            processors are faster.
        kernel_seconds: of the device, an operation, however small.
        copies: share of the pinned bandwidth that streaming reaches.
        exposed: share of offloaded inputs' transfers that nothing hides; assumed.
        unpack_8bit, unpack_4bit: passes over memory that bringing a weight back costs, in units of
            reading what is packed and writing what is computed with.
        host_gbs: of host memory that an optimizer's step there reaches; assumed.
    """

    matmul: float = 0.75
    attention: float = 0.37
    traffic: float = 0.63
    launch_seconds: float = 40e-6
    kernel_seconds: float = 6e-6
    copies: float = 0.84
    exposed: float = 0.3
    unpack_8bit: float = 3.0
    unpack_4bit: float = 0.6
    host_gbs: float = 10.0


RATES = Rates()


@dataclass(frozen=True)
class Load:
    """What a micro-batch asks of any card.

    Attributes:
        work: an image; launches for any number.
        half: products are of 16 bits.
        unpacked_bytes: moved to bring weights back, in all passes together.
        streamed_bytes: copied to the device, in all passes together.
        largest_streamed: which is waited for once.
        inputs_bytes: an image, copied to the host and back.
        recorded: kernels are started as one where the card is a GPU, so that the host costs
            nothing.
    """

    work: Work
    half: bool
    unpacked_bytes: float
    streamed_bytes: int
    largest_streamed: int
    inputs_bytes: int
    recorded: bool = False


def load_of(
    precision: Precision,
    held: Held,
    step: Step,
    *,
    offload: bool,
    recorded: bool = False,
    rates: Rates = RATES,
) -> Load:
    """Of a training step: weights come, and are brought back, forward and backward."""
    passes = 2.0 + step.again_share
    return Load(
        step.work,
        precision.arithmetic in ("bf16", "fp16"),
        passes * _unpacked_bytes(held, precision, rates),
        2 * held.streamed_bytes,
        held.largest_streamed,
        step.inputs_bytes if offload else 0,
        recorded and not offload,
    )


def _unpacked_bytes(held: Held, precision: Precision, rates: Rates) -> float:
    """Moved to bring every held linear back once: what is packed is read, the rest written."""
    cost = rates.unpack_4bit if precision.base == "nf4" else rates.unpack_8bit
    return cost * (held.packed_bytes + held.unpacked_bytes)


def micro_batch_seconds(load: Load, images: int, card: Card, rates: Rates = RATES) -> float:
    """Seconds that so many images take together."""
    work = load.work
    flops = (card.half_tflops if load.half else card.float_tflops) * 1e12
    bandwidth = card.bandwidth_gbs * 1e9 * rates.traffic
    an_image = (
        work.matmul_flops / (flops * rates.matmul)
        + work.attention_flops / (flops * rates.attention)
        + work.moved_bytes / bandwidth
    )
    device = (
        images * an_image + work.launches * rates.kernel_seconds + load.unpacked_bytes / bandwidth
    )
    to_device = card.to_device_gbs * 1e9 * rates.copies
    to_host = card.to_host_gbs * 1e9 * rates.copies
    inputs = images * load.inputs_bytes
    coming, going = (load.streamed_bytes + inputs) / to_device, inputs / to_host
    waited = load.largest_streamed / to_device + rates.exposed * (inputs / to_device + going)
    recorded = load.recorded and card.capability is not None
    launching = 0.0 if recorded else work.launches * rates.launch_seconds
    return max(device, launching, coming, going) + waited


def move_seconds(
    need: Need, carried: Carried, card: Card, *, host_states: bool, rates: Rates = RATES
) -> float:
    """Seconds of the optimizer's step: values and states are read and written, gradients read."""
    one, trained = value_bytes(need), need.adapter_numbers
    moved = trained * (3 * one + 2 * carried.state_bytes)
    if not host_states:
        return moved / (card.bandwidth_gbs * 1e9 * rates.traffic)
    # Values and gradients go, values come.
    copied = trained * one
    copies = 2 * copied / (card.to_host_gbs * 1e9) + copied / (card.to_device_gbs * 1e9)
    return moved / (rates.host_gbs * 1e9) + copies


def seconds_per_image(
    load: Load, micro_batch: int, images: int, moving: float, card: Card, rates: Rates = RATES
) -> float:
    """Of a global step of which this worker has `images`, the optimizer's step included."""
    whole, rest = divmod(images, micro_batch)
    seconds = whole * micro_batch_seconds(load, micro_batch, card, rates)
    if rest:
        seconds += micro_batch_seconds(load, rest, card, rates)
    return (seconds + moving) / images


def training_seconds(
    need: Need,
    precision: Precision,
    setting: Setting,
    card: Card,
    *,
    recorded: bool = False,
    rates: Rates = RATES,
) -> float:
    """Seconds of one micro-batch in a setting, for comparing with a measured one."""
    held = hold(need.denoiser, precision, setting.streamed)
    step = step_of(need, held, setting.checkpointing, setting.micro_batch)
    load = load_of(precision, held, step, offload=setting.offload, recorded=recorded, rates=rates)
    return micro_batch_seconds(load, setting.micro_batch, card, rates)
