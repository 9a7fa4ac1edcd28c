"""Bytes of each phase, on the device and on the host, from what a job needs and how it is fitted.

Nothing of a card is known here. What is counted is what tensors take; what the driver, workspaces
of kernels and fragments take is the reserve's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from raylora.memory.bases import bytes_of_unit
from raylora.memory.need import ModelNeed, Need, StepNeed, Work
from raylora.memory.setting import Checkpointing, Precision, Setting
from raylora.memory.stream import ring_bytes, streamed_units

FLOAT32_BYTES = 4
ENCODER_SHARES = tuple(twentieth / 20 for twentieth in range(21))
"""Of a text encoder's blocks, that may be streamed."""
CAPTIONS = 16
"""That a text encoder reads together for the cache."""
_INPUTS_HERE = 4
"""Units whose inputs are on the device at once where they are offloaded; two in each direction."""
SUMMED_BYTES = 8
"""Of a trained number's exact sum, a 64-bit integer."""


@dataclass(frozen=True)
class Carried:
    """What a run carries besides frozen weights, and which phases it has.

    Attributes:
        state_bytes: of the optimizer, a trained number.
        ema: an average is kept on the device.
        exact_sums: sums of gradients are kept in integers beside them.
        fused: a gradient is dropped as soon as it has moved its layer.
        live_encoders: VAE and text encoders are there during training.
        preview_images: predicted together for a picture; 0: none is drawn.
    """

    state_bytes: float
    ema: bool
    exact_sums: bool
    fused: bool
    live_encoders: bool
    preview_images: int


@dataclass(frozen=True)
class Held:
    """The denoiser's weights as they lie.

    Attributes:
        sizes: bytes of each unit.
        streamed: units that lie on the host.
        outside_bytes: of weights that belong to no unit; always on the device.
        packed_bytes: of linears that are held in fewer bits; 0 where they are held in full.
        unpacked_bytes: of the same in full.
        brought_back_bytes: of the largest of them in full, which is there for a moment.
    """

    sizes: tuple[int, ...]
    streamed: tuple[int, ...]
    outside_bytes: int
    packed_bytes: int = 0
    unpacked_bytes: int = 0
    brought_back_bytes: int = 0

    @cached_property
    def streamed_bytes(self) -> int:
        """That lie on the host."""
        return sum(self.sizes[i] for i in self.streamed)

    @cached_property
    def resident_bytes(self) -> int:
        """That lie on the device all the time."""
        return self.outside_bytes + sum(self.sizes) - self.streamed_bytes

    @cached_property
    def largest_streamed(self) -> int:
        """Bytes of the largest unit that lies there."""
        return max((self.sizes[i] for i in self.streamed), default=0)

    @cached_property
    def again_share(self) -> float:
        """The part of the activations that streamed units answer for.

        By number or by bytes, whichever is less: a UNet's heavy units hold small activations.
        """
        if not self.streamed:
            return 0.0
        by_bytes = self.streamed_bytes / (sum(self.sizes) or 1)
        return min(len(self.streamed) / len(self.sizes), by_bytes)

    @cached_property
    def bytes(self) -> int:
        """On the device: resident units, what is outside, and what the others come through."""
        return self.resident_bytes + ring_bytes([self.sizes[i] for i in self.streamed])


def hold(model: ModelNeed, precision: Precision, share: float) -> Held:
    """A denoiser in a precision, with so much of its units streamed."""
    number, units = precision.bytes_a_number, model.units
    sizes = _unit_sizes(model, precision)
    held = Held(sizes, streamed_units(sizes, share), model.other_numbers * number)
    if precision.base == "full":
        return held
    return replace(
        held,
        packed_bytes=sum(sizes) - sum(unit.other_numbers for unit in units) * number,
        unpacked_bytes=sum(unit.linear_numbers for unit in units) * number,
        brought_back_bytes=max((unit.largest_linear for unit in units), default=0) * number,
    )


@lru_cache(maxsize=64)  # asked for once a share
def _unit_sizes(model: ModelNeed, precision: Precision) -> tuple[int, ...]:
    number = precision.bytes_a_number
    return tuple(bytes_of_unit(unit, precision.base, number) for unit in model.units)


@dataclass(frozen=True)
class Step:
    """A training step with some units streamed.

    Attributes:
        dynamic_bytes: beyond what lies there all the time.
        inputs_bytes: of them, what units that are computed again were given, an image.
        work: for one image, launches for any number.
        again_share: the part of the units that is computed again.
    """

    dynamic_bytes: int
    inputs_bytes: int
    work: Work
    again_share: float


def step_of(need: Need, held: Held, checkpointing: Checkpointing, images: int) -> Step:
    """Streamed units are computed again, whatever the rest does: between that and `all`.

    For the uneven blocks of SD 1.5 and SDXL, and for those of FLUX, this is within 5 % of the
    dynamic bytes that the step itself takes on the meta device with such units computed again, or
    above them.
    """
    own, every, share = need.steps[checkpointing], need.steps["all"], held.again_share
    kept = _between(own.inputs_per_image, every.inputs_per_image, share)
    by_kind = {"none": 0.0, "mlp": 1.0, "alternate": 0.5, "all": 1.0}[checkpointing]
    return Step(
        _dynamic(own, every, share, images),
        kept,
        mixed_work(own.work, every.work, share),
        by_kind + (1.0 - by_kind) * share,
    )


def _dynamic(own: StepNeed, every: StepNeed, share: float, images: int) -> int:
    kept = own.dynamic.at(images)
    if not share:
        return kept
    again = every.dynamic.at(images)
    # A unit that is computed again stands in full while all before it still hold what they keep.
    one = max(0, again - every.inputs_per_image * images)
    mixed = _between(kept, again, share) + int((1 - share) * one)
    return max(again, min(kept, mixed))


def mixed_work(own: Work, every: Work, share: float) -> Work:
    """Work of a step whose streamed share is computed again and whose rest is not."""
    return Work(
        _between(own.matmul_flops, every.matmul_flops, share),
        _between(own.attention_flops, every.attention_flops, share),
        _between(own.moved_bytes, every.moved_bytes, share),
        _between(own.launches, every.launches, share),
    )


def _between(own: int, every: int, share: float) -> int:
    return int(own + (every - own) * share)


def value_bytes(need: Need) -> int:
    """Of a trained number: float32, and float64 where training is."""
    return 8 if need.arithmetic == "fp64" else FLOAT32_BYTES


def standing_bytes(need: Need, carried: Carried, held: Held, *, host_states: bool) -> int:
    """What lies on the device from the first step to the last."""
    one, trained = value_bytes(need), need.adapter_numbers
    adapter = (trained + need.adapter_constants) * one
    gradients = 0 if carried.fused else trained * one
    states = 0 if host_states else int(trained * carried.state_bytes)
    average = trained * one if carried.ema else 0
    sums = trained * SUMMED_BYTES if carried.exact_sums else 0
    number = Precision(need.arithmetic).bytes_a_number  # type: ignore[arg-type]
    texts = sum(need.text_encoders[name].numbers * number for name in need.trains_text)
    live = 0
    if carried.live_encoders:
        frozen = [
            m.numbers for name, m in need.text_encoders.items() if name not in need.trains_text
        ]
        live = (need.vae + sum(frozen)) * FLOAT32_BYTES
    return held.bytes + adapter + gradients + states + average + sums + texts + live


@dataclass(frozen=True)
class Bytes:
    """At most in each phase that the setting decides about, and on the host.

    Attributes:
        preview, preview_tiled: with the VAE's pictures whole, or in tiles; 0 where none is drawn.
    """

    train: int
    validate: int
    save: int
    preview: int
    preview_tiled: int
    host: int


def bytes_of(need: Need, carried: Carried, held: Held, setting: Setting) -> Bytes:
    """Every phase after encoding."""
    images, one = setting.micro_batch, value_bytes(need)
    copy = need.adapter_numbers * one
    standing = standing_bytes(need, carried, held, host_states=setting.host_states)
    step = step_of(need, held, setting.checkpointing, images)
    dynamic = step.dynamic_bytes
    if setting.offload:
        # Of some units they are on the device: those that leave or come, and those that are used.
        left = min(1.0, _INPUTS_HERE / max(1, len(held.sizes)))
        dynamic = max(0, dynamic - int(step.inputs_bytes * images * (1 - left)))
    dynamic += held.brought_back_bytes
    live = _encoding(need, images) if carried.live_encoders else 0
    predict = need.predict.dynamic.at(images) + held.brought_back_bytes
    single = need.predict.dynamic.at(1) + held.brought_back_bytes
    # Several workers' sum, or what an optimizer computes beside its states, is one more copy.
    train = standing + max(dynamic, copy, live)
    validate = standing + max(predict, live)
    # The average's place is taken by what it replaces; the file is read back and predicted with.
    save = standing + (copy if carried.ema else 0) + copy + single
    whole, tiled = _preview(need, carried, held)
    return Bytes(
        train,
        validate,
        save,
        standing + whole if whole else 0,
        standing + tiled if tiled else 0,
        _host(need, carried, held, setting, step),
    )


def _preview(need: Need, carried: Carried, held: Held) -> tuple[int, int]:
    if not carried.preview_images:
        return 0, 0
    drawn = need.predict.dynamic.at(carried.preview_images) + held.brought_back_bytes
    # The VAE is there for decoding alone.
    vae = 0 if carried.live_encoders else need.vae * FLOAT32_BYTES
    whole, tiled = need.decode.at(1), need.decode_tiled.at(1)
    return max(drawn, vae + whole), max(drawn, vae + tiled)


def _host(need: Need, carried: Carried, held: Held, setting: Setting, step: Step) -> int:
    inputs = step.inputs_bytes * setting.micro_batch if setting.offload else 0
    # Values and gradients go there and back, and the states stay.
    a_number = 2 * value_bytes(need) + carried.state_bytes
    states = int(need.adapter_numbers * a_number) if setting.host_states else 0
    return held.streamed_bytes + inputs + states


def _encoding(need: Need, images: int) -> int:
    """Activations of encoding where the weights are there already: one picture, some captions."""
    read = [curve.at(max(images, CAPTIONS)) for curve in need.read_text.values()]
    return max([need.encode.at(1), *read])


@dataclass(frozen=True)
class Encoding:
    """The phase before training: VAE and text encoders in float32, one at a time.

    Attributes:
        peak: bytes on the device.
        host: bytes on the host, of text encoders that are streamed.
        streamed: their components.
    """

    peak: int
    host: int
    streamed: tuple[str, ...]


def encoding_of(need: Need, budget_bytes: int) -> Encoding:
    """What caching takes, with as much of a text encoder streamed as its size asks for."""
    peaks, host, streamed = [need.vae * FLOAT32_BYTES + need.encode.at(1)], 0, []
    for name, model in need.text_encoders.items():
        reading = need.read_text[name].at(CAPTIONS)
        every = (hold(model, Precision("fp32"), share) for share in ENCODER_SHARES)
        *_, last = tried = list(every) if model.units else [hold(model, Precision("fp32"), 0.0)]
        held = next((one for one in tried if one.bytes + reading <= budget_bytes), last)
        if held.streamed:
            streamed.append(name)
            host = max(host, held.streamed_bytes)
        peaks.append(held.bytes + reading)
    return Encoding(max(peaks), host, tuple(streamed))
