"""Learning-rate schedules over global steps, so that the curve is the same on any fleet."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from pydantic import Field, field_validator, model_validator

from raylora.base.errors import OptionError
from raylora.base.lookup import did_you_mean
from raylora.base.options import Options, known_as
from raylora.optim.foreign import argument_problem, as_target, load_class

Steps = Annotated[int | float, Field(ge=0)]
Factor = Callable[[int], float]

POLYNOMIAL_END = 1e-7
"""Rate at the end of polynomial, as transformers and with it sd-scripts have it."""
_TIMESCALE = 10_000  # transformers' and sd-scripts', where there is no warm-up

WORDS: dict[str, tuple[str, ...]] = {
    "constant": ("warmup_steps",),
    "constant_with_warmup": ("warmup_steps",),
    "linear": ("warmup_steps",),
    "cosine": ("warmup_steps",),
    "cosine_with_restarts": ("warmup_steps", "cycles"),
    "polynomial": ("warmup_steps", "power"),
    "inverse_sqrt": ("warmup_steps", "timescale"),
    "cosine_with_min_lr": ("warmup_steps", "cycles", "min_ratio"),
    "warmup_stable_decay": ("warmup_steps", "decay_steps", "cycles", "min_ratio"),
    "piecewise_constant": ("step_rules",),
    "adafactor": (),
}
"""Schedules by the word in the YAML, with the options that each has."""


class ScheduleOptions(Options):
    """How the rate goes over the run."""

    name: str = Field(
        "constant",
        json_schema_extra=known_as(
            formula="t / W in warm-up, then by p = (t - W) / (T - W): constant 1; linear 1 - p; "
            "cosine (1 + cos(pi p)) / 2; cosine_with_restarts (1 + cos(pi frac(c p))) / 2; "
            "polynomial ((rate - 1e-7) (1 - p)^power + 1e-7) / rate; inverse_sqrt "
            "1 / sqrt((t - W + s) / s); cosine_with_min_lr (1 + cos(pi c p)) / 2 (1 - r) + r",
            source="transformers.optimization, which sd-scripts calls",
            sd_scripts="--lr_scheduler, --lr_scheduler_type",
            guides="scheduler",
        )
        | {"examples": [*WORDS, "torch.optim.lr_scheduler:ExponentialLR"]},
    )
    """After warm-up: constant (also constant_with_warmup) stays; linear, cosine and polynomial fall
    to zero at the last step; cosine_with_restarts does so several times; inverse_sqrt falls ever
    more slowly; cosine_with_min_lr falls to a share of the rate; warmup_stable_decay stays and
    falls at the end; piecewise_constant goes by `step_rules`; adafactor leaves it to Adafactor's
    relative form. Or any scheduler of torch's kind as `module:Class`, e.g.
    torch.optim.lr_scheduler:ExponentialLR."""
    warmup_steps: Steps = Field(
        0,
        json_schema_extra=known_as(
            formula="factor t / W; warmup_stable_decay: t / W (1 - r) + r",
            sd_scripts="--lr_warmup_steps (refused there with constant)",
        ),
    )
    """Global steps over which the rate climbs from zero; below 1, a share of the run."""
    decay_steps: Steps | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--lr_decay_steps")
    )
    """warmup_stable_decay: global steps at the end over which it falls; below 1, a share of the
    run."""
    cycles: int | None = Field(
        None, ge=1, json_schema_extra=known_as(sd_scripts="--lr_scheduler_num_cycles")
    )
    """cosine_with_restarts: how often it falls; null is once. cosine_with_min_lr and
    warmup_stable_decay: how many half waves the fall has."""
    power: float | None = Field(
        None, gt=0, json_schema_extra=known_as(sd_scripts="--lr_scheduler_power")
    )
    """polynomial: 1, which null is, falls in a straight line; more falls early, less late."""
    timescale: float | None = Field(
        None, gt=0, json_schema_extra=known_as(sd_scripts="--lr_scheduler_timescale")
    )
    """inverse_sqrt: steps after warm-up until the rate is down to 1 / sqrt(2); null is as long as
    the warm-up, or 10,000 without one."""
    min_ratio: float | None = Field(
        None, ge=0, le=1, json_schema_extra=known_as(sd_scripts="--lr_scheduler_min_lr_ratio")
    )
    """cosine_with_min_lr, warmup_stable_decay: share of the peak that the rate falls to; null is 0,
    and cosine_with_min_lr wants it."""
    step_rules: str | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--lr_scheduler_args step_rules=…")
    )
    """piecewise_constant: factors and the steps up to which they hold, then the last one:
    `1:10,0.1:20,0.01` is 1 below step 10, 0.1 below 20, then 0.01."""
    args: dict[str, Any] = Field(
        default_factory=dict, json_schema_extra=known_as(sd_scripts="--lr_scheduler_args")
    )
    """`module:Class`: its arguments by name, e.g. `{gamma: 0.999}`; steps are global ones."""

    @field_validator("name", mode="before")
    @classmethod
    def _by_its_word(cls, name: Any) -> Any:
        if not isinstance(name, str) or name in WORDS:
            return name
        target = as_target(name, "torch.optim.lr_scheduler")
        if target is None:
            raise ValueError(
                f"{name!r} is not known.{did_you_mean(name, WORDS)} Any other is named "
                "`module:Class`, e.g. torch.optim.lr_scheduler:ExponentialLR."
            )
        return target

    @field_validator("warmup_steps", "decay_steps", mode="after")
    @classmethod
    def _steps_or_share(cls, steps: float | None) -> float | None:
        if not isinstance(steps, float) or steps < 1:
            return steps
        if steps.is_integer():
            return int(steps)
        raise ValueError(f"{steps:g} is neither whole steps nor a share below 1. Round it.")

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        for problem in (_unused(self), _missing(self), _class_problem(self)):
            if problem:
                raise ValueError(problem)
        return self

    @property
    def is_class(self) -> bool:
        """Whether it is a `module:Class`."""
        return self.name not in WORDS


def make_schedule(options: ScheduleOptions, total_steps: int, rate: float = 1.0) -> Factor:
    """A function from the global step, counted from 0, to the factor on the learning rate.

    Args:
        rate: the peak rate, `optimizer.rate`; polynomial ends at 1e-7 whatever it is, and a
            `module:Class` may have arguments that are rates.

    Raises:
        OptionError: the run is too short for it, or the class refuses what it is given.
    """
    if options.is_class:
        return _simulated(options, total_steps, abs(rate))
    if options.name == "piecewise_constant":
        return _piecewise(_rules(options.step_rules or ""))
    run = _Run.of(options, total_steps, abs(rate))
    low = (options.min_ratio or 0.0) if options.name == "warmup_stable_decay" else 0.0
    after = _SHAPES[options.name](run, options)

    def factor(step: int) -> float:
        if step < run.warmup:
            return step / run.warmup * (1.0 - low) + low
        return after(step)

    return factor


@dataclass(frozen=True)
class _Run:
    """Lengths in global steps, and the peak rate."""

    total: int
    warmup: int
    decay: int
    rate: float

    @classmethod
    def of(cls, options: ScheduleOptions, total: int, rate: float) -> Self:
        warmup = _steps(options.warmup_steps, total)
        decay = _steps(options.decay_steps or 0, total)
        if options.name == "warmup_stable_decay" and warmup + decay > total:
            raise OptionError(
                f"schedule.warmup_steps and decay_steps make {warmup + decay} of the run's {total} "
                "steps. Shorten them."
            )
        if options.name == "polynomial" and rate <= POLYNOMIAL_END:
            raise OptionError(
                f"schedule.name is polynomial, which falls to {POLYNOMIAL_END:g}, and "
                f"optimizer.learning_rate is {rate:g}. Raise it, or choose linear."
            )
        return cls(total, warmup, decay, rate)

    def progress(self, step: int) -> float:
        """0 at the end of warm-up, 1 one step after the last."""
        return (step - self.warmup) / max(1, self.total - self.warmup)


def _steps(given: float, total: int) -> int:
    return int(given * total) if isinstance(given, float) else given


def _constant(run: _Run, options: ScheduleOptions) -> Factor:
    return lambda t: 1.0


def _linear(run: _Run, options: ScheduleOptions) -> Factor:
    return lambda t: max(0.0, 1.0 - run.progress(t))


def _half_wave(x: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * x))


def _cosine(run: _Run, options: ScheduleOptions) -> Factor:
    return lambda t: _half_wave(run.progress(t))


def _restarts(run: _Run, options: ScheduleOptions) -> Factor:
    cycles = options.cycles or 1

    def factor(step: int) -> float:
        p = run.progress(step)
        return 0.0 if p >= 1 else _half_wave(cycles * p % 1.0)

    return factor


def _polynomial(run: _Run, options: ScheduleOptions) -> Factor:
    power, end = options.power or 1.0, POLYNOMIAL_END

    def factor(step: int) -> float:
        left = max(0.0, 1.0 - run.progress(step))
        return float(((run.rate - end) * left**power + end) / run.rate)

    return factor


def _inverse_sqrt(run: _Run, options: ScheduleOptions) -> Factor:
    scale = options.timescale or run.warmup or _TIMESCALE
    return lambda t: 1.0 / math.sqrt((t - run.warmup + scale) / scale)


def _to_minimum(run: _Run, options: ScheduleOptions) -> Factor:
    low, cycles = options.min_ratio or 0.0, options.cycles or 1
    return lambda t: _half_wave(cycles * run.progress(t)) * (1.0 - low) + low


def _stable(run: _Run, options: ScheduleOptions) -> Factor:
    low, cycles = options.min_ratio or 0.0, options.cycles or 1
    falls = run.total - run.decay

    def factor(step: int) -> float:
        if step < falls:
            return 1.0
        if step >= run.total:
            return low
        return _half_wave(cycles * (step - falls) / run.decay) * (1.0 - low) + low

    return factor


_SHAPES: dict[str, Callable[[_Run, ScheduleOptions], Factor]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "adafactor": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _to_minimum,
    "warmup_stable_decay": _stable,
}


def _rules(text: str) -> list[tuple[float, float]]:
    """(step, factor before it) each, rising; the last holds for ever."""
    *words, last = text.split(",")
    try:
        pairs = [word.split(":") for word in words]
        rules = [(float(int(step)), float(value)) for value, step in pairs]
        rules.append((math.inf, float(last)))
    except ValueError:
        raise OptionError(
            f"schedule.step_rules is {text!r}. Write factor:step pairs and a last factor, e.g. "
            "1:10,0.1:20,0.01."
        ) from None
    steps = [step for step, _ in rules]
    if steps != sorted(set(steps)) or steps[0] < 1 or min(value for _, value in rules) < 0:
        raise OptionError(
            f"schedule.step_rules is {text!r}: its steps must rise from 1 on, and no factor may be "
            "below 0."
        )
    return rules


def _piecewise(rules: list[tuple[float, float]]) -> Factor:
    return lambda t: next(value for step, value in rules if t < step)


def schedule_warning(options: ScheduleOptions, total_steps: int) -> str | None:
    """What is allowed and seldom meant in a run of that length; None if there is nothing."""
    warmup = _steps(options.warmup_steps, total_steps)
    if warmup < total_steps or not warmup:
        return None
    return (
        f"schedule.warmup_steps is {warmup}, and the run has {total_steps} steps: the rate never "
        "comes to its peak. Lower it, e.g. to 0.05, a share of the run."
    )


class _Standing(torch.optim.Optimizer):
    """An optimizer with a rate and nothing else, so that a class that moves more is refused."""

    def __init__(self, rate: float) -> None:
        super().__init__([torch.zeros(1, requires_grad=True)], {"lr": rate})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Move nothing."""


def _simulated(options: ScheduleOptions, total_steps: int, rate: float) -> Factor:
    """The class's rates of a whole run, so that a resumed run can ask for any step's."""
    cls = load_class(options.name, torch.optim.lr_scheduler.LRScheduler)
    dummy = _Standing(rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, about how its schedulers are called
        try:
            scheduler = cls(dummy, **options.args)
            factors = [scheduler.get_last_lr()[0] / rate]
            while len(factors) < total_steps:
                dummy.step()
                scheduler.step()
                factors.append(scheduler.get_last_lr()[0] / rate)
        # Classes refuse values in any of these ways, and the values are the job's.
        except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            told = " ".join(str(error).split()).rstrip(".") or "without saying why"
            raise OptionError(
                f"schedule.name is {options.name}, whose class refuses what it is given "
                f"(schedule.args: {options.args}): {told}. Give what it needs in schedule.args."
            ) from error
    if min(factors) < 0:
        raise OptionError(f"schedule.name is {options.name}, whose rate falls below 0.")
    return lambda t: float(factors[min(t, len(factors) - 1)])


_GIVEN_BY_US = {
    "optimizer": "this is the job's. Leave it out.",
    "last_epoch": "a resumed run goes on by itself. Leave it out.",
    "verbose": "rates are in the run's log. Leave it out.",
}


def _unused(options: ScheduleOptions) -> str | None:
    used = ("args",) if options.is_class else WORDS[options.name]
    held = {
        "warmup_steps": options.warmup_steps != 0,
        "decay_steps": options.decay_steps is not None,
        "cycles": options.cycles is not None,
        "power": options.power is not None,
        "timescale": options.timescale is not None,
        "min_ratio": options.min_ratio is not None,
        "step_rules": options.step_rules is not None,
        "args": bool(options.args),
    }
    for word, given in held.items():
        if given and word not in used:
            users = [name for name, words in WORDS.items() if word in words] or ["module:Class"]
            return (
                f"schedule.{word} is given, and {options.name} does not use it. Leave it out, or "
                f"choose {' or '.join(users)}."
            )
    return None


def _missing(options: ScheduleOptions) -> str | None:
    if options.name == "cosine_with_min_lr" and options.min_ratio is None:
        return "schedule.min_ratio is missing: cosine_with_min_lr falls to it. Give e.g. 0.1."
    if options.name == "warmup_stable_decay" and not options.decay_steps:
        return (
            "schedule.decay_steps is missing: warmup_stable_decay falls over them. Give e.g. 0.2."
        )
    if options.name == "piecewise_constant":
        if options.step_rules is None:
            return "schedule.step_rules is missing. Give e.g. 1:10,0.1:20,0.01."
        try:
            _rules(options.step_rules)
        except OptionError as error:
            return str(error)
    return None


def _class_problem(options: ScheduleOptions) -> str | None:
    if not options.is_class:
        return None
    try:
        cls = load_class(options.name, torch.optim.lr_scheduler.LRScheduler)
    except OptionError as error:
        return f"schedule.name: {error}"
    if cls.__name__ == "ReduceLROnPlateau":
        return (
            f"schedule.name is {options.name}, which asks for a loss on every step; rates are "
            "known from the step alone. Choose another, e.g. warmup_stable_decay."
        )
    problem = argument_problem(cls, options.args, _GIVEN_BY_US, "schedule.args")
    if problem is None:
        try:
            _simulated(options, 2, 1.0)
        except OptionError as error:
            return str(error)
    return problem
