"""Loss scaling: float16 gradients are kept off zero and off infinity.

float16 holds nothing below 6e-8, and gradients of a LoRA's activations are often smaller. So losses
are multiplied by a power of two before the backward pass and gradients divided by it after. Where
that overflows, the step is done again with half of it: no step is lost and none counts twice.
"""

from __future__ import annotations

from raylora.base.log import get_logger

log = get_logger("train")

FIRST = 2.0**16
GROW_AFTER = 2000
"""Clean steps after which it is doubled, as torch.amp's scaler does."""
LARGEST = 2.0**24


class LossScale:
    """The factor, and how it follows overflows; the same on every worker.

    Args:
        on: off, it is 1 and stays so.
    """

    def __init__(self, *, on: bool) -> None:
        self.on = on
        self.factor = FIRST if on else 1.0
        self._clean = 0

    def overflowed(self) -> bool:
        """Halve it; False where it is 1 already, so that scaling is not to blame."""
        if not self.on or self.factor <= 1.0:
            return False
        self.factor /= 2
        self._clean = 0
        log.info("float16 overflowed: the step again with its loss times %g", self.factor)
        return True

    def passed(self) -> dict[str, float]:
        """A step was good; the factor it had, where there is scaling."""
        if not self.on:
            return {}
        used = self.factor
        self._clean += 1
        if self._clean >= GROW_AFTER and self.factor < LARGEST:
            self.factor *= 2
            self._clean = 0
        return {"loss_scale": used}

    def facts(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"factor": self.factor, "clean": self._clean}

    def restore(self, facts: dict[str, float]) -> None:
        """As a checkpoint has it."""
        if self.on:
            self.factor, self._clean = float(facts["factor"]), int(facts["clean"])
