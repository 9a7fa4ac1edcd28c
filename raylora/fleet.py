"""Options of the fleet: who trains, and how the work is shared."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raylora.base.options import Options


class WorkerKind(Options):
    """Some workers of one kind."""

    gpu: str | None = None
    """Ray's label ray.io/accelerator-type of the nodes, e.g. A100 or L4; null is any node."""
    count: int = Field(1, ge=1)
    """How many workers, one GPU each (or CPUs only, where cpus_only is set)."""


class FleetOptions(Options):
    """Workers and shares; none of it changes what is computed."""

    workers: int | tuple[WorkerKind, ...] = 1
    """How many workers, or a list of kinds {gpu, count}."""
    cpus_only: bool = False
    """Train on CPUs; each worker takes cpus_per_worker of them."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs that Ray reserves for each worker."""
    shares: Literal["measured"] | tuple[float, ...] = "measured"
    """Part of each step that each worker computes: measured from its speed, or pinned by rank."""
    refit_every_steps: int = Field(20, ge=1)
    """Global steps between measurements of the shares."""
    checksum_every_steps: int = Field(50, ge=1)
    """Global steps between comparisons of the adapter between workers."""
    max_failures: int = Field(3, ge=0)
    """Worker losses after which the run gives up; it resumes from its newest checkpoint."""

    @property
    def count(self) -> int:
        """Number of workers."""
        if isinstance(self.workers, int):
            return self.workers
        return sum(kind.count for kind in self.workers)

    @property
    def threads(self) -> int:
        """Threads of a worker that trains on CPUs."""
        return max(1, int(self.cpus_per_worker))

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.count < 1:
            raise ValueError("fleet.workers must be at least 1.")
        if self.shares == "measured":
            return self
        if len(self.shares) != self.count:
            raise ValueError(
                f"fleet.shares has {len(self.shares)} numbers for {self.count} workers; give one "
                "each, or 'measured'."
            )
        if min(self.shares) < 0 or sum(self.shares) <= 0:
            raise ValueError("fleet.shares must be 0 or more, and not all 0.")
        return self
