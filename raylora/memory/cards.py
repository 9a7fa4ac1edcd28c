"""GPUs by name, for plans of machines that are not here.

Where the figures come from: memory is what the driver reports. Products in 16 bits are the vendor's
figures (data sheets, architecture white papers), dense and with float32 sums; GeForce cards sum in
float32 at half the rate that data sheets print, which is that of float16 sums. Bandwidth and
products in float32 are the vendor's too. Copies between host and device are assumed by the
generation of PCIe: what pinned memory usually reaches on 16 lanes. A probe on the machine replaces
all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from raylora.base.errors import OptionError
from raylora.base.lookup import did_you_mean
from raylora.base.units import GIB
from raylora.memory.card import Card

MIB = 2**20
PCIE_GBS = {3: 11.0, 4: 22.0, 5: 50.0}
"""Generation -> GB/s of a pinned copy on 16 lanes; assumed."""
HOST_GIB = 32.0
"""Free host memory beside each card where nobody says; assumed."""
MOST_CARDS = 1024


@dataclass(frozen=True)
class Known:
    """A GPU's figures.

    Attributes:
        mib: of device memory, as the driver reports it.
        half_tflops, float_tflops, bandwidth_gbs: as in `Card`.
        pcie: its generation.
        source: whose figures they are.
    """

    mib: int
    capability: tuple[int, int]
    half_tflops: float
    float_tflops: float
    bandwidth_gbs: float
    pcie: int
    source: str


_GA102 = "NVIDIA's GA102 white paper"
_ADA = "NVIDIA's Ada white paper"
KNOWN = {
    "RTX3060-12G": Known(12288, (8, 6), 25.5, 12.7, 360, 4, _GA102),
    "RTX3070": Known(8192, (8, 6), 40.6, 20.3, 448, 4, _GA102),
    "RTX3090": Known(24576, (8, 6), 71.0, 35.6, 936, 4, _GA102),
    "RTX4070": Known(12282, (8, 9), 58.3, 29.1, 504, 4, _ADA),
    "RTX4080": Known(16376, (8, 9), 97.5, 48.7, 717, 4, _ADA),
    "RTX4090": Known(24564, (8, 9), 165.2, 82.6, 1008, 4, _ADA),
    "RTX5090": Known(32607, (12, 0), 209.5, 104.8, 1792, 5, "NVIDIA's RTX Blackwell white paper"),
    "A4000": Known(16376, (8, 6), 76.7, 19.2, 448, 4, "RTX A4000 data sheet"),
    "A5000": Known(24564, (8, 6), 111.1, 27.8, 768, 4, "RTX A5000 data sheet"),
    "A6000": Known(49140, (8, 6), 154.8, 38.7, 768, 4, "RTX A6000 data sheet"),
    "T4": Known(15360, (7, 5), 65.0, 8.1, 320, 3, "T4 data sheet"),
    "V100-16G": Known(16384, (7, 0), 125.0, 15.7, 900, 3, "V100 data sheet"),
    "V100-32G": Known(32768, (7, 0), 125.0, 15.7, 900, 3, "V100 data sheet"),
    "A10G": Known(23028, (8, 6), 70.0, 35.0, 600, 4, "A10G data sheet"),
    "L4": Known(23034, (8, 9), 121.0, 30.3, 300, 4, "L4 data sheet"),
    "L40S": Known(46068, (8, 9), 362.0, 91.6, 864, 4, "L40S data sheet"),
    "A100-40G": Known(40960, (8, 0), 312.0, 19.5, 1555, 4, "A100 data sheet"),
    "A100-80G": Known(81920, (8, 0), 312.0, 19.5, 1935, 4, "A100 data sheet"),
    "H100": Known(81559, (9, 0), 989.0, 67.0, 3350, 5, "H100 data sheet, SXM"),
    "H100-PCIE": Known(81559, (9, 0), 756.0, 51.0, 2000, 5, "H100 data sheet, PCIe"),
    "H200": Known(143771, (9, 0), 989.0, 67.0, 4800, 5, "H200 data sheet"),
}
"""By the words of `--gpu`."""

_NOISE = {"NVIDIA", "GEFORCE", "TESLA", "QUADRO", "SXM", "SXM2", "SXM3", "SXM4", "SXM5", "HBM3"}
_SIZE = re.compile(r"(\d+)(?:G|GB|GIB)")


def card_named(word: str, *, host_gib: float | None = None) -> Card:
    """A card by a word of `--gpu`, by Ray's label for nodes that have it, or by torch's name of it.

    `NAME-<GiB>G` is a card of that name with so much memory: `A100-40G`; one that is not known with
    it has the speed of the others of its name. A bare name that several sizes share is the smallest
    of them.

    Args:
        host_gib: free host memory beside it; None is 32.

    Raises:
        OptionError: there is no figure for it.
    """
    name, size = _parts(word)
    same = [known for known in KNOWN if _parts(known)[0] == name]
    if not same:
        raise OptionError(
            f"--gpu {word}: no figures are known for it.{did_you_mean(word.upper(), KNOWN)} "
            "Of a card that is listed with another size of memory write NAME-<GiB>G, as in "
            "RTX4090-48G."
        )
    fits = [known for known in same if size in (None, _listed_gib(known))]
    chosen = min(fits or same, key=lambda known: KNOWN[known].mib)
    card = _card(chosen, HOST_GIB if host_gib is None else host_gib)
    if fits:
        return card
    assert size is not None
    return replace(card, name=f"{name}-{size}G", total_bytes=size * GIB)


def cards_named(words: Iterable[str], *, host_gib: float | None = None) -> list[Card]:
    """Cards of a list such as `RTX4090`, `2xA100-80G`; a count says how many of them.

    Raises:
        OptionError: a word has no figures, or a count that is none.
    """
    found: list[Card] = []
    for word in words:
        count, x, name = word.partition("x")
        times = 1
        if x and count.isdecimal():
            times, word = int(count), name
            if not 1 <= times <= MOST_CARDS:
                raise OptionError(
                    f"--gpu {count}x{name}: {count} cards. Give 1 to {MOST_CARDS}, as in "
                    "2xA100-80G."
                )
        found += [card_named(word, host_gib=host_gib)] * times
    return found


def known_name(word: str) -> str | None:
    """The word of `--gpu` for what Ray or torch call a card; None where it is not listed."""
    try:
        found = card_named(word).name
    except OptionError:
        return None
    return found if found in KNOWN else None


def _card(name: str, host_gib: float) -> Card:
    known = KNOWN[name]
    copies = PCIE_GBS[known.pcie]
    return Card(
        name=name,
        total_bytes=known.mib * MIB,
        free_bytes=None,
        host_bytes=int(host_gib * GIB),
        capability=known.capability,
        half_tflops=known.half_tflops,
        float_tflops=known.float_tflops,
        bandwidth_gbs=known.bandwidth_gbs,
        to_device_gbs=copies,
        to_host_gbs=copies,
    )


def _parts(word: str) -> tuple[str, int | None]:
    """(name, GiB) of `RTX3060-12G`, `NVIDIA GeForce RTX 3060`, `NVIDIA A100-SXM4-80GB`, `A100`."""
    tokens = [one for one in re.split(r"[\s\-_/]+", word.upper()) if one and one not in _NOISE]
    sizes = [int(match[1]) for one in tokens if (match := _SIZE.fullmatch(one))]
    names = [one for one in tokens if not _SIZE.fullmatch(one)]
    name = re.sub(r"^RTX(?=A\d)", "", "".join(names))
    if name.endswith("PCIE") and name != "H100PCIE":
        name = name.removesuffix("PCIE")  # the same chip at nearly the same speed
    return name, sizes[0] if sizes else None


def _listed_gib(name: str) -> int:
    """The size that people call it by: what a box says, which the driver's figure is just below."""
    size = _parts(name)[1]
    if size is not None:
        return size
    nominal = (8, 12, 16, 24, 32, 48, 80, 141)
    return next(gib for gib in nominal if KNOWN[name].mib <= gib * 1024)
