"""A card as the planner sees it: probed on the machine, or known by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

BF16 = (8, 0)
FP8 = (8, 9)
FLASH = (8, 0)
"""Compute capabilities from which on a GPU computes bfloat16, 8-bit floats and flash attention."""


@dataclass(frozen=True)
class Card:
    """One worker's device and what stands around it.

    Attributes:
        name: as `--gpu` takes it, "RTX3060-12G", or what the driver calls it.
        total_bytes: of device memory.
        free_bytes: of it, before this worker takes any; None where nothing was probed.
        host_bytes: of host memory that this worker may take.
        capability: CUDA's compute capability; None is a CPU.
        half_tflops: dense matrix products in 16 bits with float32 sums, at most (vendor's figure or
            measured), TFLOP/s.
        float_tflops: in float32.
        bandwidth_gbs: of device memory, GB/s (10^9).
        to_device_gbs, to_host_gbs: pinned copies, GB/s (10^9).
        dollars_per_hour: what it costs; None is not known.
        limited: its memory is a budget that somebody set (`memory.budget_gib`), not what is there.
    """

    name: str
    total_bytes: int
    free_bytes: int | None
    host_bytes: int
    capability: tuple[int, int] | None
    half_tflops: float
    float_tflops: float
    bandwidth_gbs: float
    to_device_gbs: float
    to_host_gbs: float
    dollars_per_hour: float | None = None
    limited: bool = False

    @property
    def bf16(self) -> bool:
        """Whether it computes bfloat16; a CPU does, in its own way."""
        return self.capability is None or self.capability >= BF16

    @property
    def fp8(self) -> bool:
        """Whether it has products of 8-bit floats."""
        return self.capability is not None and self.capability >= FP8

    @property
    def flash(self) -> bool:
        """Whether torch's flash attention runs on it."""
        return self.capability is not None and self.capability >= FLASH

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, held: Mapping[str, Any]) -> Self:
        """Back again."""
        capability = held["capability"]
        return cls(**{**held, "capability": tuple(capability) if capability else None})
