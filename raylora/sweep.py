"""Options of a sweep: which dotted paths of a job are tried, how many times, and when to give up.

Trials are drawn here and not by Ray, so a campaign is known whole before anything runs: each
trial's job can be checked, and trial 3 is the same trial on every machine and after every restart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from raylora.base.errors import JobError
from raylora.base.lookup import did_you_mean
from raylora.base.options import Options, explain
from raylora.base.seeds import draw_generator, sample_number
from raylora.base.yaml_file import read_yaml_file

Values = dict[str, Any]
"""What one trial sets: dotted path -> value."""

# What a trial decides for itself, and what must be one for all: the store, and the ruler.
FIXED = {
    "name": "each trial gets its own from the campaign's",
    "store": "a campaign has one; set it beside `space`",
    "fleet": "a trial is one process; set max_concurrent beside `space`",
    "loss": "held-out losses of unlike losses cannot be compared",
    "validation": "it is the ruler that all trials are measured with",
}


class Axis(Options):
    """What one dotted path may be; give exactly one of the three."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """These values."""
    uniform: tuple[float, float] | None = None
    """Any number from the first to the second."""
    loguniform: tuple[float, float] | None = None
    """The same, every power of ten as likely as the next; for learning rates."""

    @model_validator(mode="before")
    @classmethod
    def _known_words(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            raise ValueError(f"{given!r} is no range. Write it like {{choice: [1, 2, 4]}}.")
        unknown = [str(word) for word in given if word not in cls.model_fields]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is no kind of range.{did_you_mean(unknown[0], cls.model_fields)}"
            )
        return given

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(kind is not None for kind in (self.choice, self.uniform, self.loguniform)) != 1:
            raise ValueError("give exactly one of choice, uniform and loguniform.")
        low, high = self.uniform or self.loguniform or (1.0, 2.0)
        if not low < high or not math.isfinite(high - low):
            raise ValueError(f"[{low}, {high}] must rise and be finite.")
        if self.loguniform and low <= 0:
            raise ValueError(f"[{low}, {high}] must be above 0: it is drawn by its logarithm.")
        return self

    def draw(self, part: float) -> Any:
        """The value at `part` in [0, 1) of the range, numbers to four significant digits."""
        if self.choice is not None:
            return self.choice[int(part * len(self.choice))]
        if self.uniform is not None:
            low, high = self.uniform
            return float(f"{low + part * (high - low):.4g}")
        assert self.loguniform is not None
        low, high = map(math.log, self.loguniform)
        return float(f"{math.exp(low + part * (high - low)):.4g}")


class SweepOptions(Options):
    """A search space file: one job, tried with other values in some places."""

    name: str
    """The campaign's name; its trials are the runs `<name>-000`, `<name>-001` and so on."""
    job: str
    """The job file that is varied."""
    store: str | None = None
    """Where the campaign and its runs live; null is the job's store."""
    space: dict[str, Axis] = Field(min_length=1)
    """Dotted path of the job -> its range."""
    every_trial: Values = Field(default_factory=dict)
    """Dotted paths that all trials set alike, such as fewer steps; `--apply best` leaves them."""
    search: Literal["grid", "random"] = "grid"
    """Every combination of choices, or `samples` draws."""
    samples: int | None = Field(None, ge=1)
    """Trials of a random search. More of them later adds trials and repeats none."""
    seed: int = Field(0, ge=0, lt=2**63)
    """From it come the draws of a random search."""
    metric: Literal["validation"] = "validation"
    """What is best: the lowest loss on the job's held-out images, at fixed timesteps and noise."""
    scheduler: Literal["asha", "none"] = "asha"
    """Stop trials that are behind (asha), or let all of them end."""
    grace_steps: int = Field(100, ge=1)
    """Steps before asha may stop a trial."""
    reduction_factor: float = Field(2, gt=1)
    """At grace_steps and each time that many times more, asha keeps the best 1 in so many."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at once; null is as many as the cluster holds."""
    previews: bool = False
    """Draw the job's previews in every trial."""

    @field_validator("space")
    @classmethod
    def _free_paths(cls, space: dict[str, Axis]) -> dict[str, Axis]:
        for path in space:
            section = path.split(".")[0]
            if section in FIXED:
                raise ValueError(f"{path} cannot be swept: {FIXED[section]}.")
        return space

    @field_validator("every_trial")
    @classmethod
    def _not_the_trials_own(cls, every_trial: Values) -> Values:
        for path in every_trial:
            if path in ("name", "store"):
                raise ValueError(f"{path} cannot be set there: {FIXED[path]}.")
        return every_trial

    @model_validator(mode="after")
    def _search_fits(self) -> Self:
        both = [path for path in self.space if path in self.every_trial]
        if both:
            raise ValueError(f"{both[0]} is in space and in every_trial; leave it in one.")
        if self.search == "random" and self.samples is None:
            raise ValueError("search: random needs samples, the number of trials.")
        if self.search == "grid" and self.samples is not None:
            raise ValueError("samples belongs to search: random; a grid tries every combination.")
        ranges = [path for path, axis in self.space.items() if axis.choice is None]
        if self.search == "grid" and ranges:
            raise ValueError(
                f"space.{ranges[0]} is a range, and a grid needs a choice: list its values, or "
                "write search: random and samples."
            )
        return self

    def trials(self) -> list[Values]:
        """Every trial's values, in the order of their numbers; nothing is tried twice."""
        if self.search == "grid":
            choices = [axis.choice or () for axis in self.space.values()]
            drawn = [
                dict(zip(self.space, values, strict=True)) for values in itertools.product(*choices)
            ]
        else:
            drawn = [self._draw(number) for number in range(self.samples or 0)]
        return [values for i, values in enumerate(drawn) if values not in drawn[:i]]

    def _draw(self, number: int) -> Values:
        return {
            path: axis.draw(
                draw_generator(self.seed, number, sample_number(path, 0), "variant").random()
            )
            for path, axis in self.space.items()
        }


def load_sweep(path: str | Path, *, job: str | None = None) -> SweepOptions:
    """Read a search space file.

    Args:
        path: the YAML file.
        job: the job file to vary in place of the one it names.

    Raises:
        JobError: everything that is wrong with it, one sentence each.
    """
    tree = read_yaml_file(
        path,
        wanted="a search space",
        holds="name, job and space; see tune_spaces/quickstart.yaml",
    )
    try:
        return SweepOptions.model_validate(tree | ({"job": job} if job else {}))
    except ValidationError as error:
        raise JobError(explain(error, SweepOptions)) from None
