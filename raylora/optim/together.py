"""What optimizer, schedule and the trained parts do not agree on."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from raylora.optim.options import OptimizerOptions, Part
from raylora.optim.schedules import ScheduleOptions


def rate_problems(
    optimizer: OptimizerOptions,
    schedule: ScheduleOptions,
    *,
    trains_denoiser: bool,
    trains_text: bool,
    network: str = "lora",
    fast: Collection[str] = ("up",),
) -> list[str]:
    """One sentence for each pair of options that cannot work together or would have no effect.

    Args:
        network: the kind of network, for the sentence.
        fast: its parameters that LoRA+ moves faster.
    """
    return [
        *_schedule_problems(optimizer, schedule),
        *_part_problems(optimizer, trains_denoiser, trains_text),
        *([] if fast else _plus_problems(optimizer, network)),
    ]


def _plus_problems(optimizer: OptimizerOptions, network: str) -> Iterator[str]:
    ratios = {
        "lora_plus_ratio": optimizer.lora_plus_ratio,
        "lora_plus_denoiser_ratio": optimizer.lora_plus_denoiser_ratio,
        "lora_plus_text_encoder_ratio": optimizer.lora_plus_text_encoder_ratio,
    }
    for word, ratio in ratios.items():
        if ratio is not None:
            yield (
                f"optimizer.{word} moves one of two halves faster, and network.kind {network} has "
                "no such halves. Leave it out, or choose network.kind: lora."
            )


def _schedule_problems(optimizer: OptimizerOptions, schedule: ScheduleOptions) -> Iterator[str]:
    steady = schedule.name in ("constant", "constant_with_warmup")
    if schedule.name == "adafactor" and not optimizer.own_rate:
        yield (
            f"schedule.name is adafactor, and optimizer.name is {optimizer.name}, which does not "
            "find its own rate. Choose another schedule, or adafactor in its relative form."
        )
    elif optimizer.own_rate and not (
        schedule.name == "adafactor" or (steady and not schedule.warmup_steps)
    ):
        yield (
            f"schedule.name is {schedule.name}, and adafactor in its relative form finds its own "
            "rate. Leave the schedule out, or set optimizer.args.relative_step: false; "
            "optimizer.args.warmup_init: true warms up the relative form."
        )
    from_zero = bool(schedule.warmup_steps) and not schedule.min_ratio
    if optimizer.kind.never_zero and from_zero:
        yield (
            f"schedule.warmup_steps begins at a rate of 0, by which {optimizer.name} divides. "
            "Leave it out; optimizer.args.growth_rate: 1.02 lets the estimate grow slowly."
        )
    if optimizer.schedule_free:
        if not steady:
            yield (
                f"schedule.name is {schedule.name}, and {optimizer.name} averages instead of "
                "lowering the rate. Leave the schedule out; schedule.warmup_steps may stay."
            )
        elif schedule.warmup_steps and "warmup_steps" in optimizer.args:
            yield (
                "schedule.warmup_steps and optimizer.args.warmup_steps would warm up twice. Leave "
                "one out."
            )


def _part_problems(
    optimizer: OptimizerOptions, trains_denoiser: bool, trains_text: bool
) -> Iterator[str]:
    parts = (
        (
            trains_denoiser,
            "denoiser",
            {
                "denoiser_rate": optimizer.denoiser_rate is not None,
                "lora_plus_denoiser_ratio": optimizer.lora_plus_denoiser_ratio is not None,
                "block_rates": optimizer.block_rates.given,
            },
        ),
        (
            trains_text,
            "text_encoder",
            {
                "text_encoder_rate": optimizer.text_encoder_rate is not None,
                "text_encoder_stop": optimizer.text_encoder_stop is not None,
                "lora_plus_text_encoder_ratio": optimizer.lora_plus_text_encoder_ratio is not None,
            },
        ),
    )
    for trained, part, words in parts:
        for word, given in words.items():
            if given and not trained:
                yield (
                    f"optimizer.{word} is given, and network.train leaves the {part} out. Leave it "
                    "out, or set network.train: both."
                )
    alone = trains_text and (not trains_denoiser or optimizer.denoiser_rate == 0)
    if optimizer.text_encoder_stop is not None and alone:
        yield (
            "optimizer.text_encoder_stop is given, and nothing but the text encoder is trained, so "
            "that the rest of the run would move nothing. Leave it out, or shorten training.steps."
        )
    yield from _unused_rates(optimizer, trains_denoiser, trains_text)
    each: tuple[tuple[Part, bool], ...] = (
        ("denoiser", trains_denoiser),
        ("text_encoder", trains_text),
    )
    trained_parts = [part for part, on in each if on]
    rates = [rate for part in trained_parts for rate in optimizer.rates_of(part)]
    if rates and not any(rates):
        yield (
            f"optimizer: the rate of all that network.train chooses ({', '.join(trained_parts)}) "
            "is 0. Give it a rate, or train another part."
        )


def _unused_rates(
    optimizer: OptimizerOptions, trains_denoiser: bool, trains_text: bool
) -> Iterator[str]:
    """What is given for all that is trained, while each part has its own."""
    parts = [
        part for part, on in (("denoiser", trains_denoiser), ("text_encoder", trains_text)) if on
    ]
    for word, own in (("learning_rate", "{}_rate"), ("lora_plus_ratio", "lora_plus_{}_ratio")):
        owns = [own.format(part) for part in parts]
        if getattr(optimizer, word) is None or not owns:
            continue
        if all(getattr(optimizer, one) is not None for one in owns):
            yield (
                f"optimizer.{word} is {getattr(optimizer, word):g}, and all that is trained has "
                f"its own ({', '.join(owns)}). Leave one of them out."
            )
