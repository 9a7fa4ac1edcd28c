"""Every setting that a job allows, with what it takes, and how each does on one card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from raylora.base.units import GIB
from raylora.memory.card import Card
from raylora.memory.need import Need
from raylora.memory.options import MemoryOptions
from raylora.memory.peaks import Bytes, Carried, Encoding, bytes_of, encoding_of, hold, step_of
from raylora.memory.seconds import RATES, Load, Rates, load_of, move_seconds, seconds_per_image
from raylora.memory.setting import CHECKPOINTINGS, Checkpointing, Precision, Setting

SHARES = tuple(tenth / 10 for tenth in range(11))
"""Shares of the units that `auto` may stream."""
MOST_TOGETHER = 8
"""Images of a micro-batch, where the job gives no limit: more make a step hardly faster."""
_TOGETHER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_UNREADABLE = 0.015
"""Of an unprobed card's memory, what its driver keeps of it."""
_CONTEXT_BYTES = int(0.55 * GIB)
"""What CUDA's context and its libraries take on an unprobed card; assumed."""
LIBRARY_BYTES = int(0.135 * GIB)
"""What cuBLAS and cuDNN take of torch's memory for their workspaces; measured on an H100, where the
peaks of 23 steps lay 0.13 to 0.15 GiB above what their tensors took."""
HOST_SHARE = 0.7
"""Of the host's free memory, where the job gives no limit."""
BEYOND = 1.15
"""Settings of up to so many times the budget are kept, should a measurement allow them."""


@dataclass(frozen=True)
class Asked:
    """What a job asks of its workers besides its models.

    Attributes:
        arithmetic: `training.precision`.
        state_bytes: of the optimizer as it is named, a trained number (adamw 8).
        state_bytes_8bit: of its twin with states in 8 bits; None: it has none.
        ema: an average is kept on the device.
        exact_sums: `training.sums` is exact, which takes one image at a time.
        previews: pictures are drawn during training.
        live_encoders: VAE and text encoders are there during training, for nothing is cached.
        fused: the adapter is moved within the backward pass.
        bnb: bitsandbytes is there.
        encodes: something is cached before training.
        preview_images: predicted together for a picture, 2 with guidance.
        recorded: a GPU's kernels are started as one (`memory.cuda_graphs`) where the setting allows
            it.
    """

    images_per_step: int
    options: MemoryOptions
    arithmetic: Literal["fp32", "bf16", "fp16", "fp64"]
    state_bytes: float = 8.0
    state_bytes_8bit: float | None = None
    ema: bool = False
    exact_sums: bool = False
    previews: bool = False
    live_encoders: bool = False
    fused: bool = False
    bnb: bool = False
    encodes: bool = True
    preview_images: int = 2
    recorded: bool = False

    def carried(self, precision: Precision) -> Carried:
        """What a run in a precision carries."""
        small = precision.states == "8bit" and self.state_bytes_8bit is not None
        return Carried(
            state_bytes=(self.state_bytes_8bit or 0.0) if small else self.state_bytes,
            ema=self.ema,
            exact_sums=self.exact_sums,
            fused=self.fused,
            live_encoders=self.live_encoders,
            preview_images=self.preview_images if self.previews else 0,
        )


@dataclass(frozen=True)
class Candidate:
    """One setting on one card.

    Attributes:
        peaks: bytes of device memory at most, in each phase that the job has.
        host_bytes: of host memory at most.
        reason: "" where it fits; else which phase needs how much, and what is there.
    """

    setting: Setting
    peaks: Mapping[str, int]
    host_bytes: int
    seconds_per_image: float
    reason: str

    @property
    def peak(self) -> int:
        """The largest of its peaks."""
        return max(self.peaks.values())


@dataclass(frozen=True)
class Sized:
    """A setting with what it takes on any card."""

    setting: Setting
    bytes: Bytes
    load: Load


@dataclass(frozen=True)
class Room:
    """What a worker has, and what of it the job's own ways take.

    Attributes:
        images: of a step, expected to be this worker's.
        together: images of a micro-batch at most.
        budget, host_budget: bytes that may be filled.
        encoding: the phase before training; None: there is none.
        tiling: of previews, as the job says.
    """

    card: Card
    images: int
    together: int
    budget: int
    host_budget: int
    encoding: Encoding | None
    tiling: Literal["auto"] | bool

    def peaks(self, found: Bytes) -> dict[str, int]:
        """Of each phase that the job has."""
        peaks = {"encode": self.encoding.peak} if self.encoding else {}
        peaks |= {"train": found.train, "validate": found.validate, "save": found.save}
        if found.preview:
            peaks["preview"] = found.preview_tiled if self.tiles(found) else found.preview
        more = library_bytes(self.card)
        return {phase: most + more for phase, most in peaks.items()}

    def tiles(self, found: Bytes) -> bool:
        """Whether previews are decoded in tiles: where they must be, or do not fit in whole."""
        if self.tiling == "auto":
            return found.preview + library_bytes(self.card) > self.budget
        return self.tiling

    def peak(self, found: Bytes) -> int:
        """The largest of all phases'."""
        encode = self.encoding.peak if self.encoding else 0
        preview = found.preview_tiled if self.tiles(found) else found.preview
        most = max(encode, found.train, found.validate, found.save, preview)
        return most + library_bytes(self.card)

    def host(self, found: Bytes) -> int:
        """Of host memory at most."""
        return max(found.host, self.encoding.host if self.encoding else 0)

    def misses(self, found: Bytes) -> int:
        """Bytes by which it does not fit, of device or host; 0 or less: it fits."""
        return max(self.peak(found) - self.budget, self.host(found) - self.host_budget)

    def reason(self, found: Bytes) -> str:
        """Why it does not fit, "" where it does."""
        phase, most = max(self.peaks(found).items(), key=lambda entry: entry[1])
        said = []
        if most > self.budget:
            said.append(f"{phase} needs {_apart(most, self.budget)} GiB")
        if self.host(found) > self.host_budget:
            phase = "encode" if self.encoding and self.encoding.host > found.host else "train"
            needed = _apart(self.host(found), self.host_budget)
            said.append(f"{phase} needs {needed} GiB of host memory")
        return ", ".join(said)


def library_bytes(card: Card) -> int:
    """What a GPU's libraries take beside tensors; nothing on a CPU."""
    return 0 if card.capability is None else LIBRARY_BYTES


def _apart(needed: int, there: int) -> str:
    """`7.62 of 6.80`, rounded so that what is needed is not what is there."""
    digits = 2 if needed - there >= 0.01 * GIB else 6
    return f"{needed / GIB:.{digits}f} of {there / GIB:.{digits}f}"


def budget_bytes(card: Card, options: MemoryOptions) -> int:
    """Device memory that a plan may fill: what is free, capped by the job, less the reserve.

    Of a card that was not probed, what its driver and CUDA usually take is taken off first.
    """
    if card.free_bytes is not None:
        usable = card.free_bytes
    elif card.capability is None:  # a CPU's memory, or its budget: nobody takes a part of it
        usable = card.total_bytes
    else:
        usable = int(card.total_bytes * (1 - _UNREADABLE)) - _CONTEXT_BYTES
    if options.budget_gib is not None:
        usable = min(usable, int(options.budget_gib * GIB))
    return usable - int(options.reserve_gib * GIB)


def host_budget_bytes(card: Card, options: MemoryOptions) -> int:
    """Host memory that a plan may fill."""
    if options.host_gib is not None:
        return int(options.host_gib * GIB)
    return int(card.host_bytes * HOST_SHARE)


def rooms_of(need: Need, asked: Asked, cards: Sequence[Card]) -> list[Room]:
    """Each worker's, in the order of the cards."""
    options, rooms = asked.options, []
    half = asked.arithmetic in ("bf16", "fp16")
    speeds = [card.half_tflops if half else card.float_tflops for card in cards]
    for card, speed in zip(cards, speeds, strict=True):
        share = speed / sum(speeds)
        # The least whole number that is enough, and one where floats say a little more than one.
        images = max(1, -int(-asked.images_per_step * share * (1 - 1e-9) // 1))
        budget = budget_bytes(card, options)
        rooms.append(
            Room(
                card,
                images,
                _together(asked, images),
                budget,
                host_budget_bytes(card, options),
                encoding_of(need, budget - library_bytes(card)) if asked.encodes else None,
                options.vae_tiling,
            )
        )
    return rooms


def _together(asked: Asked, images: int) -> int:
    if asked.fused:
        return asked.images_per_step
    if asked.exact_sums:
        return 1
    return min(images, asked.options.max_micro_batch or MOST_TOGETHER)


def sized_settings(
    need: Need, asked: Asked, precision: Precision, most: int, rates: Rates = RATES
) -> list[Sized]:
    """All that the job allows, with micro-batches of up to `most` images."""
    carried, options = asked.carried(precision), asked.options
    found = []
    for share in _shares(need, options):
        held = hold(need.denoiser, precision, share)
        for checkpointing in _checkpointings(need, options):
            again = checkpointing != "none" or bool(held.streamed)
            for offload in _either(options.offload_inputs, free=again):
                if offload and not again:
                    continue
                step = step_of(need, held, checkpointing, 1)
                load = load_of(
                    *(precision, held, step),
                    offload=offload,
                    recorded=asked.recorded,
                    rates=rates,
                )
                for host_states in _either(options.host_states, free=not asked.fused):
                    for together in _micro_batches(asked, most):
                        setting = Setting(checkpointing, share, offload, together, host_states)
                        found.append(Sized(setting, bytes_of(need, carried, held, setting), load))
    return found


def _shares(need: Need, options: MemoryOptions) -> Iterable[float]:
    if not need.denoiser.units or (options.compile and options.streaming == "auto"):
        return (0.0,)
    return SHARES if options.streaming == "auto" else (float(options.streaming),)


def checkpointings_of(options: MemoryOptions) -> tuple[Checkpointing, ...]:
    """What `auto` may choose; compiled blocks are computed again whole or not at all."""
    return tuple(kind for kind in CHECKPOINTINGS if not (options.compile and kind == "mlp"))


def _checkpointings(need: Need, options: MemoryOptions) -> Iterable[Checkpointing]:
    if options.checkpointing != "auto":
        return (options.checkpointing,)
    return (kind for kind in checkpointings_of(options) if kind in need.steps)


def _either(word: Literal["auto"] | bool, *, free: bool) -> Iterable[bool]:
    """What a word leaves open; `auto` leaves a choice where there is one."""
    if word == "auto":
        return (False, True) if free else (False,)
    return (word,)


def _micro_batches(asked: Asked, most: int) -> Iterator[int]:
    if asked.fused:
        yield asked.images_per_step
        return
    yield from (count for count in _TOGETHER if count < most)
    yield most


def simplicity(setting: Setting) -> tuple[bool, bool, float, int, int]:
    """Less is simpler; decides between settings of one speed."""
    again = CHECKPOINTINGS.index(setting.checkpointing)
    return setting.host_states, setting.offload, setting.streamed, again, setting.micro_batch


def kind_of(setting: Setting) -> tuple[Checkpointing, bool, bool, bool]:
    """Which strategies are on, whatever their amounts."""
    streams = setting.streamed > 0
    return setting.checkpointing, streams, setting.offload, setting.host_states


class Judge:
    """How settings of one precision do on one card."""

    def __init__(
        self, need: Need, asked: Asked, precision: Precision, room: Room, rates: Rates = RATES
    ) -> None:
        carried = asked.carried(precision)
        self._room, self._rates = room, rates
        self._moving = {
            host: move_seconds(need, carried, room.card, host_states=host, rates=rates)
            for host in (False, True)
        }

    def seconds(self, sized: Sized) -> float:
        """An image takes."""
        setting, room = sized.setting, self._room
        moving = self._moving[setting.host_states]
        return seconds_per_image(
            sized.load, setting.micro_batch, room.images, moving, room.card, self._rates
        )

    def candidate(self, sized: Sized) -> Candidate:
        """All that is known of it."""
        room, found = self._room, sized.bytes
        return Candidate(
            sized.setting,
            room.peaks(found),
            room.host(found),
            self.seconds(sized),
            room.reason(found),
        )
