"""What each optimizer is: its class, its package, and what raylora must know of its ways."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from raylora.base.errors import OptionError
from raylora.base.lookup import did_you_mean
from raylora.optim.foreign import arguments_of, as_target, load_class


@dataclass(frozen=True)
class Kind:
    """One optimizer.

    Attributes:
        target: its class, as `module:Class`.
        extra: which of raylora's extras brings its package; "" where none is needed.
        spellings: how sd-scripts writes it; read in any case.
        rate: the peak rate where the job gives none.
        betas: how many it has.
        eps, weight_decay: whether it has one number of that name.
        shapes: it looks at a layer's shape, or may; else it moves one flat tensor a group.
        estimates_rate: it finds the size of its steps; the rate only scales it.
        never_zero: it divides by what a rate of 0 leaves at 0.
        schedule_free: what is trained and what people get differ; see `state.shown_values`.
        paged: its state moves between the GPU's and the host's memory.
        state_bytes: of its state for each trained number, as the job's defaults have it.
        always: arguments that are always given; a job's own replace them.
    """

    target: str
    extra: str = ""
    spellings: tuple[str, ...] = ()
    rate: float = 1e-4
    betas: int = 2
    eps: bool = True
    weight_decay: bool = True
    shapes: bool = False
    estimates_rate: bool = False
    never_zero: bool = False
    schedule_free: bool = False
    paged: bool = False
    state_bytes: float = 8.0
    always: Mapping[str, Any] = field(default_factory=dict)

    @property
    def moves_alone(self) -> bool:
        """Whether a parameter's step depends on nothing but itself, its gradient and its states, so
        that parameters may move one after another. Of other packages' classes it is not known."""
        if self.estimates_rate or self.schedule_free:
            return False
        return self in KINDS.values() or self.target.startswith("torch.optim")


_8BIT = 1 + 4 / 256
"""Bytes of a state in 8 bits: bitsandbytes keeps a float32 scale for each block of 256."""


def _bnb(name: str, **ways: Any) -> Kind:
    paged = name.startswith("Paged")
    return Kind(f"bitsandbytes.optim:{name}", "bnb", (name,), paged=paged, **ways)


def _dadapt(name: str, *spellings: str, module: str = "dadaptation", **ways: Any) -> Kind:
    ways = {"state_bytes": 12.0, **ways}
    return Kind(
        f"{module}:{name}", "optimizers", spellings or (name,), 1.0, estimates_rate=True, **ways
    )


_LION: dict[str, Any] = {"rate": 3e-5, "eps": False}
# Chen et al. 2023: Lion's rate is 3-10 times smaller than AdamW's, since each step is a whole sign.

KINDS: dict[str, Kind] = {
    # fused: one pass over the buffer, on a CPU a tenth of the time for a large adapter
    "adamw": Kind("torch.optim:AdamW", spellings=("AdamW",), always={"fused": True}),
    "adamw8bit": _bnb("AdamW8bit", state_bytes=2 * _8BIT),
    "paged_adamw": _bnb("PagedAdamW"),
    "paged_adamw8bit": _bnb("PagedAdamW8bit", state_bytes=2 * _8BIT),
    "paged_adamw32bit": _bnb("PagedAdamW32bit"),
    "ademamix8bit": _bnb("AdEMAMix8bit", betas=3, state_bytes=3 * _8BIT),
    "paged_ademamix8bit": _bnb("PagedAdEMAMix8bit", betas=3, state_bytes=3 * _8BIT),
    "lion": Kind("lion_pytorch:Lion", "optimizers", ("Lion",), state_bytes=4.0, **_LION),
    "lion8bit": _bnb("Lion8bit", state_bytes=_8BIT, **_LION),
    "paged_lion8bit": _bnb("PagedLion8bit", state_bytes=_8BIT, **_LION),
    "adafactor": Kind(
        "transformers.optimization:Adafactor",
        spellings=("AdaFactor",),
        betas=0,
        eps=False,
        shapes=True,
        state_bytes=0.26,  # a row's and a column's mean: 4 / rank and 4 / width, here of 16, 1024
    ),
    "prodigy": Kind(
        *("prodigyopt:Prodigy", "optimizers", ("Prodigy",), 1.0),
        estimates_rate=True,
        state_bytes=16.0,
    ),
    "dadaptation": _dadapt(
        "DAdaptAdamPreprint",
        "DAdaptation",
        "DAdaptAdamPreprint",
        module="dadaptation.experimental",
    ),
    "d_adapt_adagrad": _dadapt("DAdaptAdaGrad", betas=0),
    "d_adapt_adam": _dadapt("DAdaptAdam"),
    "d_adapt_adan": _dadapt("DAdaptAdan", betas=3, state_bytes=20.0),
    "d_adapt_adan_ip": _dadapt(
        "DAdaptAdanIP", module="dadaptation.experimental", betas=3, state_bytes=20.0
    ),
    "d_adapt_lion": _dadapt("DAdaptLion", eps=False, state_bytes=8.0),
    "d_adapt_sgd": _dadapt("DAdaptSGD", betas=0, eps=False, never_zero=True),
    "sgd_nesterov": Kind(
        "torch.optim:SGD",
        spellings=("SGDNesterov",),
        rate=1e-3,
        betas=0,
        eps=False,
        state_bytes=4.0,
        always={"nesterov": True, "momentum": 0.9},
    ),
    "sgd_nesterov8bit": Kind(
        "bitsandbytes.optim:SGD8bit",
        "bnb",
        ("SGDNesterov8bit",),
        1e-3,
        betas=0,
        eps=False,
        state_bytes=_8BIT,
        always={"nesterov": True, "momentum": 0.9},
    ),
    "adamw_schedule_free": Kind(
        "schedulefree:AdamWScheduleFree", "optimizers", ("AdamWScheduleFree",), schedule_free=True
    ),
    "sgd_schedule_free": Kind(
        "schedulefree:SGDScheduleFree",
        "optimizers",
        ("SGDScheduleFree",),
        1.0,
        betas=0,
        eps=False,
        schedule_free=True,
        state_bytes=4.0,
    ),
    "radam_schedule_free": Kind(
        "schedulefree:RAdamScheduleFree", "optimizers", ("RAdamScheduleFree",), schedule_free=True
    ),
}
"""Optimizers by the word in the YAML."""

_SPELLED = {
    spelling.lower(): name for name, kind in KINDS.items() for spelling in (name, *kind.spellings)
}
_TARGETS = {kind.target: name for name, kind in KINDS.items() if "nesterov" not in kind.always}


def normal_name(given: str) -> str:
    """The word for an optimizer that is written in raylora's way or in sd-scripts'.

    Raises:
        OptionError: it is neither a known optimizer nor `module:Class`.
    """
    if known := _SPELLED.get(given.lower()):
        return known
    target = as_target(given, "torch.optim")
    if target is None:
        raise OptionError(
            f"{given!r} is not known.{did_you_mean(given, KINDS)} Any other optimizer is named "
            "`module:Class`, e.g. torch.optim:NAdam."
        )
    return _TARGETS.get(target, target)


def kind_of(name: str) -> Kind:
    """The kind behind a normal name; that of a `module:Class` is read from its signature."""
    return KINDS[name] if name in KINDS else _foreign(name)


@lru_cache
def _foreign(target: str) -> Kind:
    cls = load_optimizer(Kind(target))
    arguments = arguments_of(cls)
    if "lr" not in arguments:
        raise OptionError(
            f"{target} takes no `lr`, so that its rate cannot be set. Choose another."
        )
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise OptionError(
            f"{target} asks for the loss anew within a step (`closure`); a global step has one "
            "gradient. Choose another."
        )
    eps = arguments.get("eps")
    betas = arguments["betas"].default if "betas" in arguments else ()
    return replace(
        Kind(target),
        betas=len(betas) if isinstance(betas, tuple | list) else 2,
        eps=eps is not None and not isinstance(eps.default, tuple | list),
        weight_decay="weight_decay" in arguments,
        shapes=True,
        schedule_free=callable(getattr(cls, "train", None))
        and callable(getattr(cls, "eval", None)),
    )


def load_optimizer(kind: Kind) -> type[torch.optim.Optimizer]:
    """The class of a kind.

    Raises:
        OptionError: its package is not installed; the message names the extra that brings it.
    """
    if kind.extra:
        package = kind.target.partition(":")[0].partition(".")[0]
        try:
            __import__(package)
        except ImportError:
            raise OptionError(
                f"optimizer.name needs the package {package}, which is not installed. "
                f'pip install "raylora[{kind.extra}]", or choose optimizer.name: adamw.'
            ) from None
    return load_class(kind.target, torch.optim.Optimizer)
