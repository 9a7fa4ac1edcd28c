"""What may be done to make a job fit: the run's one precision, and each worker's own setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

Checkpointing = Literal["none", "mlp", "alternate", "all"]
"""Which units are computed again in the backward pass: none; of each its feed-forward part; every
second; all."""
CHECKPOINTINGS: tuple[Checkpointing, ...] = get_args(Checkpointing)
BaseKind = Literal["full", "int8", "fp8", "nf4"]
"""How the frozen linears of the units are held: as they are computed with, or in fewer bits."""
BASE_KINDS: tuple[BaseKind, ...] = get_args(BaseKind)
"""From the best to the smallest."""
States = Literal["full", "8bit"]
"""The optimizer's states: in the adapter's dtype, or in 8 bits a number."""


@dataclass(frozen=True)
class Precision:
    """One choice for the whole run and every worker in it, since it changes what is computed.

    Attributes:
        arithmetic: of base and activations, `training.precision`.
    """

    arithmetic: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    base: BaseKind = "full"
    states: States = "full"

    @property
    def bytes_a_number(self) -> int:
        """Of activations, and of weights that are held in full."""
        return {"fp64": 8, "fp32": 4}.get(self.arithmetic, 2)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, held: Mapping[str, Any]) -> Self:
        """Back again."""
        return cls(**held)


@dataclass(frozen=True)
class Setting:
    """What one worker does to fit, none of which changes what is computed.

    Attributes:
        streamed: share, 0 to 1, of the units' bytes that lie on the host and come when they are
            needed; the units are evenly spaced. A streamed unit is always computed again.
        offload: what units that are computed again were given waits on the host.
        micro_batch: images that go through the denoiser together, at most.
        host_states: the optimizer's states lie and move on the host.
    """

    checkpointing: Checkpointing = "none"
    streamed: float = 0.0
    offload: bool = False
    micro_batch: int = 1
    host_states: bool = False

    def but(self, **changes: Any) -> Setting:
        """The same with something else."""
        return replace(self, **changes)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, held: Mapping[str, Any]) -> Self:
        """Back again."""
        return cls(**held)
