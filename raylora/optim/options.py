"""How the adapter is moved: the options, and what of them cannot go together."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from raylora.base.errors import OptionError
from raylora.base.options import Options, known_as
from raylora.optim.block_rates import BlockRates
from raylora.optim.foreign import argument_problem, arguments_of
from raylora.optim.kinds import KINDS, Kind, kind_of, load_optimizer, normal_name

Beta = Annotated[float, Field(ge=0, lt=1)]
Part = Literal["denoiser", "text_encoder"]


class OptimizerOptions(Options):
    """How the adapter is moved."""

    name: str = Field(
        "adamw",
        json_schema_extra=known_as(sd_scripts="--optimizer_type", guides="optimizer")
        | {"examples": [*KINDS, "torch.optim:NAdam"]},
    )
    """adamw: Adam with decoupled weight decay, the one to start with. adamw8bit, ademamix8bit,
    lion8bit: the state in 8 bits, in a quarter of its memory; paged_adamw, paged_adamw8bit,
    paged_adamw32bit, paged_ademamix8bit, paged_lion8bit: it may also move to the host's memory
    (CUDA only). lion: moves by signs, at a third of AdamW's rate. adafactor: little state; without
    more, in its relative form, which finds its own rate. prodigy, dadaptation, d_adapt_adagrad,
    d_adapt_adam, d_adapt_adan, d_adapt_adan_ip, d_adapt_lion, d_adapt_sgd: estimate the rate; leave
    learning_rate out. sgd_nesterov; sgd_nesterov8bit (bitsandbytes takes Nesterov's name and does
    plain momentum). adamw_schedule_free, sgd_schedule_free, radam_schedule_free: average their way
    instead of lowering the rate. Or any other as `module:Class`, e.g. torch.optim:NAdam.
    sd-scripts' spellings are read too."""
    learning_rate: float | None = Field(
        None,
        json_schema_extra=known_as(
            formula="negative: its size, with the gradient's sign turned",
            sd_scripts="--learning_rate (2e-6 where not given)",
            guides="learning rate, lr",
        ),
    )
    """Peak rate, at strength alpha / rank = 1. Null: 1e-4; 3e-5 for Lion; 1 for those that estimate
    their rate; 1e-3 for SGD and 1 for its schedule-free form. Below 0, training goes away from the
    images."""
    betas: tuple[Beta, ...] | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--optimizer_args betas")
    )
    """Memory of the mean and of the variance of the gradient; AdEMAMix and Adan have three. Null:
    the optimizer's own, e.g. 0.9 and 0.999 for AdamW, 0.9 and 0.99 for Lion."""
    eps: float | None = Field(
        None, gt=0, json_schema_extra=known_as(sd_scripts="--optimizer_args eps")
    )
    """Keeps the division finite where gradients vanish. Null: the optimizer's own, mostly 1e-8."""
    weight_decay: float | None = Field(
        None,
        ge=0,
        json_schema_extra=known_as(
            formula="AdamW: weight -= rate * weight_decay * weight",
            sd_scripts="--optimizer_args weight_decay",
        ),
    )
    """Pull of every weight to zero, times the rate. Null: the optimizer's own: 0.01 for AdamW and
    AdEMAMix in all forms, 0.02 for Adan, 0 for the others of the names above."""
    max_grad_norm: float = Field(
        1.0,
        ge=0,
        json_schema_extra=known_as(sd_scripts="--max_grad_norm", guides="gradient clipping"),
    )
    """The gradient of a whole global step is shortened to this length; 0 leaves it as it is, as is
    usual with Adafactor."""
    args: dict[str, Any] = Field(
        default_factory=dict, json_schema_extra=known_as(sd_scripts="--optimizer_args")
    )
    """Other arguments of the optimizer's class by name, e.g. `{d_coef: 2}` for prodigy, or
    `{relative_step: false, scale_parameter: false}` for Adafactor with a rate of yours."""
    denoiser_rate: float | None = Field(
        None, json_schema_extra=known_as(sd_scripts="--unet_lr", guides="UNet learning rate")
    )
    """Peak rate of the denoiser; null is learning_rate, 0 does not train it."""
    text_encoder_rate: float | tuple[float, ...] | None = Field(
        None,
        json_schema_extra=known_as(
            sd_scripts="--text_encoder_lr", guides="text encoder learning rate"
        )
        | {"examples": [5e-5, [5e-5, 1e-5]]},
    )
    """Peak rate of the text encoders, often a half to a tenth of the denoiser's; null is
    learning_rate, 0 does not train them. Or a list with one number for each of the base's text
    encoders: CLIP-L, CLIP-G for SDXL, with T5 behind them for SD 3; CLIP-L, T5 for FLUX."""
    text_encoder_stop: float | None = Field(
        None,
        gt=0,
        lt=1,
        json_schema_extra=known_as(
            formula="nothing moves it from step text_encoder_stop * steps on",
            sd_scripts="none for LoRA (train_db.py: --stop_text_encoder_training, in steps)",
            guides="stop text encoder training",
        ),
    )
    """Share of the run after which the text encoder stays as it is; null trains it to the end."""
    lora_plus_ratio: float | None = Field(
        None,
        gt=0,
        json_schema_extra=known_as(
            formula="up gets rate * ratio, down gets rate",
            source="Hayou et al. 2024, arXiv 2402.12354",
            sd_scripts="--network_args loraplus_lr_ratio",
            guides="LoRA+",
        ),
    )
    """How many times faster `up` learns than `down`; the paper's is 16. Null: the same."""
    lora_plus_denoiser_ratio: float | None = Field(
        None, gt=0, json_schema_extra=known_as(sd_scripts="--network_args loraplus_unet_lr_ratio")
    )
    """The same, for the denoiser alone; null is lora_plus_ratio."""
    lora_plus_text_encoder_ratio: float | None = Field(
        None,
        gt=0,
        json_schema_extra=known_as(sd_scripts="--network_args loraplus_text_encoder_lr_ratio"),
    )
    """The same, for the text encoders alone; null is lora_plus_ratio."""
    scale_rate: Literal["none", "linear", "sqrt"] = Field(
        "none",
        json_schema_extra=known_as(
            formula="linear: rate * images_per_step; sqrt: rate * sqrt(images_per_step)",
            source="linear: Goyal et al. 2017, arXiv 1706.02677; sqrt: Krizhevsky 2014, "
            "arXiv 1404.5997",
            guides="scale learning rate",
        ),
    )
    """Whether rates are for one image and grow with `training.images_per_step`."""
    block_rates: BlockRates = BlockRates()
    """Rates by block of the denoiser."""
    rates: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {},
        json_schema_extra=known_as(
            formula="rate of a layer = its part's rate * its block's number * its number here",
            sd_scripts="--network_args network_reg_lrs (regular expressions over its own names, "
            "and rates in place of factors)",
        )
        | {"examples": [{"*.attn2.*": 0.5, "mlp": 2, "*.to_out.0": 0}]},
    )
    """Factors on the rates of some layers: glob over names, what layers do, or stretch of the
    model, as in `network.ranks` -> factor, e.g. `{"*.attn2.*": 0.5, mlp: 2}`. The first that fits a
    layer counts; layers that nothing fits keep their rate, and 0 leaves a layer out, in the file
    too."""

    @field_validator("name", mode="before")
    @classmethod
    def _by_its_word(cls, name: Any) -> Any:
        if not isinstance(name, str):
            return name
        try:
            word = normal_name(name)
            kind_of(word)
        except OptionError as error:
            raise ValueError(str(error)) from error
        return word

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        for problem in (
            _argument_of_none(self),
            _args_problem(self),
            _own_rate_problem(self),
            _one_rate_problem(self),
            _zero_problem(self),
            _ratio_problem(self),
        ):
            if problem:
                raise ValueError(problem)
        return self

    @property
    def kind(self) -> Kind:
        """What is known of the optimizer."""
        return kind_of(self.name)

    @property
    def estimates_rate(self) -> bool:
        """It finds the size of its steps; the rate, usually 1, scales what it finds."""
        return self.kind.estimates_rate

    @property
    def own_rate(self) -> bool:
        """Its rate is its own alone: Adafactor in its relative form."""
        return self.name == "adafactor" and bool(self.args.get("relative_step", True))

    @property
    def one_rate(self) -> bool:
        """All that is trained has the same rate."""
        return self.estimates_rate or self.own_rate

    @property
    def schedule_free(self) -> bool:
        """It trains other values than those that people get."""
        return self.kind.schedule_free

    @property
    def rate(self) -> float:
        """Peak rate, signed; 1 where the rate is the optimizer's own."""
        if self.own_rate:
            return 1.0
        return self.kind.rate if self.learning_rate is None else self.learning_rate

    @property
    def text_rates(self) -> tuple[float, ...]:
        """Peak rates of the text encoders, signed: one for all of them, or one for each."""
        own = self.text_encoder_rate
        if isinstance(own, tuple):
            return own
        return (self.rate if own is None else own,)

    def rates_of(self, part: Part) -> tuple[float, ...]:
        """Peak rates of a part of the model, signed; 0 for what is not trained."""
        if part == "text_encoder":
            return self.text_rates
        return (self.rate if self.denoiser_rate is None else self.denoiser_rate,)

    def plus_ratio(self, part: Part) -> float | None:
        """How many times faster `up` learns there; None where it does not."""
        own = (
            self.lora_plus_denoiser_ratio
            if part == "denoiser"
            else self.lora_plus_text_encoder_ratio
        )
        return self.lora_plus_ratio if own is None else own

    @property
    def arguments(self) -> dict[str, Any]:
        """What its class is made with, but for parameters and rate."""
        given = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        named = {word: value for word, value in given.items() if value is not None}
        return {**self.kind.always, **named, **self.args}

    @property
    def spelled(self) -> str:
        """As `ss_optimizer` tells it: the class, and the arguments that it was given."""
        words = ",".join(f"{word}={value}" for word, value in self.arguments.items())
        return self.kind.target.replace(":", ".") + (f"({words})" if words else "")


_ADAFACTOR_ARGS = {
    "betas": "Give optimizer.args.beta1",
    "eps": "It has two: give optimizer.args.eps: [1.0e-30, 1.0e-3]",
}
_TAKEN = {
    "params": "these are the adapter's. Leave it out.",
    "lr": "give optimizer.learning_rate.",
    "maximize": "give a negative optimizer.learning_rate.",
    "differentiable": "a step is not differentiated. Leave it out.",
    "capturable": "steps are not captured. Leave it out.",
    "fsdp_in_use": "every worker holds the whole adapter. Leave it out.",
    "optim_bits": "this is in the name: adamw8bit, paged_adamw32bit, …",
    "is_paged": "this is in the name: paged_adamw8bit, …",
    "args": "give its contents by name.",
}


def taken_words(options: OptimizerOptions) -> dict[str, str]:
    """Names of arguments that `optimizer.args` may not hold, with what to do instead."""
    kind = options.kind
    taken = dict(_TAKEN)
    for word, held in (
        ("betas", kind.betas),
        ("eps", kind.eps),
        ("weight_decay", kind.weight_decay),
    ):
        if held:
            taken[word] = f"give optimizer.{word}."
    if "nesterov" in kind.always:
        taken["nesterov"] = "this is in the name. torch.optim:SGD is without."
    return taken


def _argument_of_none(options: OptimizerOptions) -> str | None:
    kind = options.kind
    held = {"betas": bool(kind.betas), "eps": kind.eps, "weight_decay": kind.weight_decay}
    for word, has in held.items():
        value = getattr(options, word)
        if value is not None and not has:
            hint = _ADAFACTOR_ARGS.get(word, "Leave it out")
            hint = hint if options.name == "adafactor" else "Leave it out"
            return f"optimizer.{word} is given, and {options.name} has none. {hint}."
    if options.betas is not None and len(options.betas) != kind.betas:
        return (
            f"optimizer.betas has {len(options.betas)} numbers, and {options.name} has "
            f"{kind.betas}. Give as many."
        )
    return None


ADAFACTOR_FLAGS = {"relative_step", "scale_parameter", "warmup_init"}
"""Every version of its class has them, and importing it to ask takes seconds."""


def _args_problem(options: OptimizerOptions) -> str | None:
    """Names against the class's signature; a package that is missing here is told later."""
    if not options.args:
        return None
    relative = options.args.get("relative_step")
    if relative is False and options.args.get("warmup_init") is True:
        return (
            "optimizer.args.warmup_init is for the relative form, and relative_step is false. "
            "Leave out one of them; schedule.warmup_steps warms up the fixed form."
        )
    kind, given = options.kind, options.args.items()
    if kind is KINDS["adafactor"] and all(
        word in ADAFACTOR_FLAGS and isinstance(value, bool) for word, value in given
    ):
        return None
    try:
        cls = load_optimizer(kind)
    except OptionError:
        return None
    problem = argument_problem(cls, options.args, taken_words(options), "optimizer.args")
    if problem is None and "momentum" in arguments_of(cls) and "nesterov" in kind.always:
        momentum = options.args.get("momentum", 0.9)
        if not momentum:
            return "optimizer.args.momentum is 0, and Nesterov's method needs some. Give 0.9."
    return problem


def _given_rates(options: OptimizerOptions) -> list[tuple[str, float]]:
    text = () if options.text_encoder_rate is None else options.text_rates
    held = [
        ("learning_rate", options.learning_rate),
        ("denoiser_rate", options.denoiser_rate),
        *(("text_encoder_rate", rate) for rate in text),
    ]
    return [(word, rate) for word, rate in held if rate is not None]


def _own_rate_problem(options: OptimizerOptions) -> str | None:
    if not options.own_rate:
        return None
    for word, rate in _given_rates(options):
        if rate or word == "learning_rate":
            return (
                f"optimizer.{word} is {rate:g}, and adafactor in its relative form finds its own "
                "rate. Leave it out, or set optimizer.args.relative_step: false."
            )
    return None


def _one_rate_problem(options: OptimizerOptions) -> str | None:
    if not options.one_rate:
        return None
    name = options.name
    reason = (
        f"{name} estimates one rate for all that is trained"
        if options.estimates_rate
        else f"{name} in its relative form finds its own rate"
    )
    for word in ("lora_plus_ratio", "lora_plus_denoiser_ratio", "lora_plus_text_encoder_ratio"):
        if getattr(options, word) is not None:
            return f"optimizer.{word} gives `up` another rate, and {reason}. Leave it out."
    if options.block_rates.given:
        return f"optimizer.block_rates gives blocks their own rates, and {reason}. Leave it out."
    if not set(options.rates.values()) <= {0.0, 1.0}:
        return f"optimizer.rates gives layers their own rates, and {reason}. Leave it out."
    if options.scale_rate != "none":
        return f"optimizer.scale_rate is {options.scale_rate}, and {reason}. Leave it out."
    for word, rate in _given_rates(options):
        if rate < 0:
            return (
                f"optimizer.{word} is {rate:g}, and {reason}, which cannot be below 0. Choose "
                "another optimizer, or a rate above 0."
            )
    parts = [*options.rates_of("denoiser"), *options.text_rates]
    if len(set(parts) - {0.0}) > 1:
        *first, last = (f"{rate:g}" for rate in parts)
        return (
            f"optimizer.denoiser_rate and text_encoder_rate come to {', '.join(first)} and {last}, "
            f"and {reason}. Give optimizer.learning_rate alone."
        )
    if options.text_encoder_stop is not None and options.estimates_rate:
        return (
            f"optimizer.text_encoder_stop is given, and {reason}: the estimate would jump when a "
            "part stops. Leave it out, or choose another optimizer."
        )
    return None


def _zero_problem(options: OptimizerOptions) -> str | None:
    if options.text_encoder_rate == ():
        return (
            "optimizer.text_encoder_rate is an empty list. Give a number for each text encoder, or "
            "leave it out."
        )
    if options.learning_rate == 0:
        return (
            "optimizer.learning_rate is 0, which trains nothing. Give a rate; denoiser_rate: 0 or "
            "text_encoder_rate: 0 leave one part as it is."
        )
    if not any(options.rates_of("denoiser")) and not any(options.text_rates):
        return "optimizer.denoiser_rate and text_encoder_rate are both 0, which trains nothing."
    return None


def _ratio_problem(options: OptimizerOptions) -> str | None:
    own = (options.lora_plus_denoiser_ratio, options.lora_plus_text_encoder_ratio)
    if options.lora_plus_ratio is not None and None not in own:
        return (
            "optimizer.lora_plus_ratio has no effect where both lora_plus_denoiser_ratio and "
            "lora_plus_text_encoder_ratio are given. Leave it out."
        )
    if not any(options.text_rates):
        for word in ("lora_plus_text_encoder_ratio", "text_encoder_stop"):
            if getattr(options, word) is not None:
                return f"optimizer.{word} is given, and text_encoder_rate is 0. Drop one."
    if options.denoiser_rate == 0:
        if options.lora_plus_denoiser_ratio is not None:
            return "optimizer.lora_plus_denoiser_ratio is given, and denoiser_rate is 0. Drop one."
        if options.block_rates.given:
            return "optimizer.block_rates is given, and denoiser_rate is 0. Drop one."
    return None
