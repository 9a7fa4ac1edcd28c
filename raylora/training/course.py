"""When things happen in a run, in global steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Course:
    """When things happen; None is never (but at the end).

    Attributes:
        save_every, validate_every, preview_every: global steps between them.
        preview_first: previews are drawn at step 0 too.
        keep_best: the measurement that is the best so far has its checkpoint.
        patience: measurements without an improvement after which the run ends; None is never.
        min_delta: what counts as one, as a part of the loss.
    """

    total_steps: int
    save_every: int | None
    validate_every: int | None
    preview_every: int | None
    refit_every: int
    checksum_every: int
    preview_first: bool = True
    keep_best: bool = False
    patience: int | None = None
    min_delta: float = 0.0

    def saves_at(self, done: int) -> bool:
        """Whether a checkpoint is due after so many steps, whatever was measured."""
        return done == self.total_steps or is_due(done, self.save_every)

    def validates_at(self, done: int) -> bool:
        """Whether the held-out loss is due; the base's own is, at step 0."""
        return done in (0, self.total_steps) or is_due(done, self.validate_every)

    def previews_at(self, done: int) -> bool:
        """Whether previews are due."""
        if done == 0:
            return self.preview_first
        return done == self.total_steps or is_due(done, self.preview_every)


def is_due(done: int, every: int | None) -> bool:
    """Whether something that happens every so many steps does after `done` of them."""
    return every is not None and done % every == 0


def steps_between(steps: int | None, epochs: int | None, steps_per_epoch: int) -> int | None:
    """Global steps between two of something that is given in steps or in epochs, if at all."""
    return steps if epochs is None else epochs * steps_per_epoch
