"""What of an optimizer, a schedule and the trained parts goes together, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from raylora.optim.kinds import KINDS
from raylora.optim.optimizers import OptimizerOptions
from raylora.optim.schedules import ScheduleOptions
from raylora.optim.together import rate_problems

SPELLED = {
    "AdamW": "adamw",
    "AdamW8bit": "adamw8bit",
    "PagedAdamW": "paged_adamw",
    "PagedAdamW8bit": "paged_adamw8bit",
    "PagedAdamW32bit": "paged_adamw32bit",
    "AdEMAMix8bit": "ademamix8bit",
    "bitsandbytes.optim.PagedAdEMAMix8bit": "paged_ademamix8bit",
    "Lion": "lion",
    "Lion8bit": "lion8bit",
    "PagedLion8bit": "paged_lion8bit",
    "SGDNesterov": "sgd_nesterov",
    "SGDNesterov8bit": "sgd_nesterov8bit",
    "DAdaptation": "dadaptation",
    "DAdaptAdamPreprint": "dadaptation",
    "DAdaptAdaGrad": "d_adapt_adagrad",
    "DAdaptAdam": "d_adapt_adam",
    "DAdaptAdan": "d_adapt_adan",
    "DAdaptAdanIP": "d_adapt_adan_ip",
    "DAdaptLion": "d_adapt_lion",
    "DAdaptSGD": "d_adapt_sgd",
    "Prodigy": "prodigy",
    "AdaFactor": "adafactor",
    "AdamWScheduleFree": "adamw_schedule_free",
    "SGDScheduleFree": "sgd_schedule_free",
    "RAdamScheduleFree": "radam_schedule_free",
    "NAdam": "torch.optim:NAdam",
    "prodigyopt.Prodigy": "prodigy",
    "torch.optim:SGD": "torch.optim:SGD",
}


@pytest.mark.parametrize(("theirs", "ours"), SPELLED.items())
def test_sd_scripts_spellings_are_read(theirs: str, ours: str):
    assert OptimizerOptions(name=theirs).name == ours
    if ":" not in ours and "." not in theirs:
        assert OptimizerOptions(name=theirs.lower()).name == ours


def test_every_known_optimizer_has_a_spelling_of_sd_scripts():
    assert set(KINDS) <= set(SPELLED.values())


@pytest.mark.parametrize("name", [*KINDS, "torch.optim:NAdam", "torch.optim:Adagrad"])
def test_options_read_from_their_own_dump_are_the_same(name: str):
    options = OptimizerOptions(name=name)
    assert OptimizerOptions.model_validate_json(options.model_dump_json()) == options


def test_what_is_known_of_the_optimizers():
    kinds = {name: OptimizerOptions(name=name) for name in KINDS}
    estimating = {name for name, one in kinds.items() if one.estimates_rate}
    assert estimating == {"prodigy", "dadaptation"} | {n for n in KINDS if n.startswith("d_adapt_")}
    assert {name for name, one in kinds.items() if one.own_rate} == {"adafactor"}
    assert {name for name, one in kinds.items() if one.one_rate} == estimating | {"adafactor"}
    free = {name for name, one in kinds.items() if one.schedule_free}
    assert free == {name for name in KINDS if name.endswith("schedule_free")}


@pytest.mark.slow
def test_adafactor_with_a_given_rate_is_as_any_other():
    fixed = OptimizerOptions(name="adafactor", args={"relative_step": False})
    assert not fixed.own_rate
    assert not fixed.one_rate


def test_the_peak_rate_is_the_optimizers_usual_one_where_the_job_gives_none():
    rates = {name: OptimizerOptions(name=name).rate for name in KINDS}
    assert all(rates[name] == 1 for name in KINDS if OptimizerOptions(name=name).one_rate)
    assert (rates["adamw"], rates["paged_adamw8bit"], rates["lion"]) == (1e-4, 1e-4, 3e-5)
    given = OptimizerOptions(learning_rate=3e-4, denoiser_rate=2e-4)
    assert (given.rates_of("denoiser"), given.rates_of("text_encoder")) == ((2e-4,), (3e-4,))
    several = OptimizerOptions(text_encoder_rate=[5e-5, 0, 1e-5])
    assert several.rates_of("text_encoder") == (5e-5, 0, 1e-5)


@pytest.mark.slow
def test_the_metadata_tell_the_class_and_what_it_was_given():
    options = OptimizerOptions(
        name="AdamW8bit", weight_decay=0.1, betas=(0.9, 0.99), args={"min_8bit_size": 1}
    )
    told = "bitsandbytes.optim.AdamW8bit(betas=(0.9, 0.99),weight_decay=0.1,min_8bit_size=1)"
    assert options.spelled == told


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": 0}, "learning_rate is 0, which trains nothing"),
    ({"eps": 0}, "greater than 0"),
    ({"weight_decay": -1}, "greater than or equal to 0"),
    ({"max_grad_norm": -1}, "greater than or equal to 0"),
    ({"betas": (1.0, 0.999)}, "less than 1"),
    ({"betas": (-0.1, 0.9)}, "greater than or equal to 0"),
    ({"betas": (0.9,)}, "betas has 1 numbers, and adamw has 2"),
    ({"name": "ademamix8bit", "betas": (0.9, 0.99)}, "ademamix8bit has 3"),
    ({"name": "adamm"}, "Did you mean 'adamw'"),
    ({"name": "torch.optim:LBFGS"}, "asks for the loss anew within a step"),
    ({"name": "torch.optim:Adamm"}, "torch.optim has no Adamm. Did you mean 'Adam'"),
    ({"name": "nowhere:Adam"}, "nowhere:Adam cannot be imported"),
    ({"name": "torch.optim.lr_scheduler:StepLR"}, "is not a kind of torch.optim.optimizer"),
    ({"name": "sgd_nesterov", "betas": (0.9, 0.99)}, "betas is given, and sgd_nesterov has none"),
    ({"name": "lion", "eps": 1e-8}, "eps is given, and lion has none. Leave it out"),
    ({"name": "adafactor", "eps": 1e-8}, r"give optimizer.args.eps: \[1.0e-30, 1.0e-3\]"),
    ({"name": "prodigy", "args": {"d_coeff": 2}}, "no such argument. Did you mean 'd_coef'"),
    ({"args": {"lr": 2}}, "args.lr: give optimizer.learning_rate"),
    ({"args": {"weight_decay": 2}}, "give optimizer.weight_decay"),
    ({"args": {"betas": [0.9, 0.9]}}, "give optimizer.betas"),
    ({"args": {"maximize": True}}, "give a negative optimizer.learning_rate"),
    ({"args": {"params": 1}}, "these are the adapter's"),
    ({"name": "prodigy", "args": {"fsdp_in_use": True}}, "every worker holds the whole adapter"),
    ({"name": "sgd_nesterov", "args": {"nesterov": False}}, "this is in the name"),
    ({"name": "sgd_nesterov", "args": {"momentum": 0}}, "Nesterov's method needs some"),
    ({"name": "adamw8bit", "args": {"is_paged": True}}, "this is in the name: paged_adamw8bit"),
    ({"name": "adafactor", "learning_rate": 1e-3}, "set optimizer.args.relative_step: false"),
    ({"name": "adafactor", "denoiser_rate": 1e-3}, "finds its own rate"),
    (
        {"name": "adafactor", "args": {"relative_step": False, "warmup_init": True}},
        "warmup_init is for the relative form",
    ),
    ({"name": "adafactor", "lora_plus_ratio": 4}, "gives `up` another rate"),
    ({"name": "prodigy", "lora_plus_ratio": 4}, "prodigy estimates one rate for all"),
    ({"name": "prodigy", "lora_plus_denoiser_ratio": 4}, "prodigy estimates one rate for all"),
    ({"name": "d_adapt_adam", "block_rates": {"mid": 0.5}}, "gives blocks their own rates"),
    ({"name": "d_adapt_adam", "rates": {"mlp": 0.5}}, "gives layers their own rates"),
    ({"name": "prodigy", "text_encoder_rate": 0.5}, "come to 1 and"),
    ({"name": "prodigy", "text_encoder_rate": [1, 0.5]}, "come to 1, 1 and 0.5"),
    ({"name": "adafactor", "text_encoder_rate": [0, 1e-5]}, "finds its own rate"),
    ({"rates": {"mlp": -1}}, "greater than or equal to 0"),
    ({"text_encoder_rate": []}, "text_encoder_rate is an empty list"),
    ({"text_encoder_stop": 0.5, "text_encoder_rate": [0, 0]}, "text_encoder_rate is 0"),
    ({"name": "prodigy", "learning_rate": -1}, "which cannot be below 0"),
    ({"name": "prodigy", "scale_rate": "sqrt"}, "scale_rate is sqrt, and prodigy estimates"),
    ({"name": "prodigy", "text_encoder_stop": 0.5}, "the estimate would jump"),
    ({"denoiser_rate": 0, "text_encoder_rate": 0}, "are both 0, which trains nothing"),
    ({"text_encoder_stop": 1.0}, "less than 1"),
    ({"text_encoder_stop": 0.5, "text_encoder_rate": 0}, "text_encoder_rate is 0"),
    ({"block_rates": {"mid": 0.5}, "denoiser_rate": 0}, "denoiser_rate is 0"),
    ({"block_rates": {"down": []}}, "block_rates.down is an empty list"),
    ({"lora_plus_ratio": 0}, "greater than 0"),
    (
        {
            "lora_plus_ratio": 4,
            "lora_plus_denoiser_ratio": 4,
            "lora_plus_text_encoder_ratio": 4,
        },
        "lora_plus_ratio has no effect where both",
    ),
]


def slow_where_imported(cases: list[Any]) -> list[Any]:
    """Arguments are checked against the class, whose package may take seconds to import."""
    return [
        pytest.param(*case, marks=pytest.mark.slow)
        if case[0].get("args") and case[0].get("name") in ("adafactor", "adamw8bit")
        else case
        for case in cases
    ]


@pytest.mark.parametrize(("words", "told"), slow_where_imported(REFUSED))
def test_what_cannot_work_is_refused(words: dict[str, Any], told: str):
    with pytest.raises(ValidationError, match=told):
        OptimizerOptions(**words)


ALLOWED: list[dict[str, Any]] = [
    {"name": "prodigy", "text_encoder_rate": 0},
    {"name": "prodigy", "text_encoder_rate": 1, "denoiser_rate": 1},
    {"name": "prodigy", "text_encoder_rate": [1, 0], "rates": {"*.a.*": 0, "mlp": 1}},
    {"name": "prodigy", "args": {"d_coef": 2, "safeguard_warmup": True}, "weight_decay": 0.01},
    {"name": "adafactor", "text_encoder_stop": 0.5},
    {"name": "adafactor", "args": {"eps": [1e-30, 1e-3], "warmup_init": True}},
    {
        "name": "adafactor",
        "learning_rate": 1e-4,
        "args": {"relative_step": False, "scale_parameter": False},
        "lora_plus_ratio": 4,
        "block_rates": {"mid": 0.5},
    },
    {"name": "adamw_schedule_free", "lora_plus_ratio": 4, "learning_rate": -1e-3},
    {"name": "d_adapt_adan", "betas": (0.98, 0.92, 0.99)},
]


@pytest.mark.parametrize(("words", "told"), slow_where_imported([(one, "") for one in ALLOWED]))
def test_what_can_work_is_allowed(words: dict[str, Any], told: str):
    assert OptimizerOptions(**words).model_dump(include=set(words)).keys() == words.keys()


TOGETHER: list[tuple[dict[str, Any], dict[str, Any], tuple[bool, bool], str]] = [
    ({}, {"name": "adafactor"}, (True, True), "which does not find its own rate"),
    ({"name": "adafactor"}, {"name": "cosine"}, (True, True), "warmup_init: true warms up"),
    ({"name": "adafactor"}, {"warmup_steps": 3}, (True, True), "finds its own rate"),
    ({"name": "d_adapt_sgd"}, {"warmup_steps": 3}, (True, True), "by which d_adapt_sgd divides"),
    (
        {"name": "adamw_schedule_free"},
        {"name": "cosine"},
        (True, True),
        "averages instead of lowering the rate",
    ),
    (
        {"name": "adamw_schedule_free", "args": {"warmup_steps": 3}},
        {"warmup_steps": 3},
        (True, True),
        "would warm up twice",
    ),
    ({"text_encoder_rate": 1e-5}, {}, (True, False), "leaves the text_encoder out"),
    ({"text_encoder_stop": 0.5}, {}, (True, False), "leaves the text_encoder out"),
    ({"lora_plus_text_encoder_ratio": 2}, {}, (True, False), "leaves the text_encoder out"),
    ({"denoiser_rate": 1e-5}, {}, (False, True), "leaves the denoiser out"),
    ({"block_rates": {"mid": 2}}, {}, (False, True), "leaves the denoiser out"),
    ({"text_encoder_stop": 0.5}, {}, (False, True), "nothing but the text encoder is trained"),
    (
        {"text_encoder_stop": 0.5, "denoiser_rate": 0},
        {},
        (True, True),
        "nothing but the text encoder is trained",
    ),
    ({"denoiser_rate": 0}, {}, (True, False), r"chooses \(denoiser\) is 0"),
]


@pytest.mark.parametrize(("optimizer", "schedule", "trains", "told"), TOGETHER)
def test_what_does_not_agree_is_told(
    optimizer: dict[str, Any], schedule: dict[str, Any], trains: tuple[bool, bool], told: str
):
    problems = rate_problems(
        OptimizerOptions(**optimizer),
        ScheduleOptions(**schedule),
        trains_denoiser=trains[0],
        trains_text=trains[1],
    )
    assert len(problems) == 1
    with pytest.raises(ValueError, match=told):
        raise ValueError(problems[0])


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    slow_where_imported(
        [
            ({}, {"name": "cosine", "warmup_steps": 0.1}),
            ({"name": "adafactor"}, {"name": "adafactor"}),
            ({"name": "adafactor"}, {}),
            ({"name": "adafactor", "args": {"relative_step": False}}, {"name": "cosine"}),
            ({"name": "adamw_schedule_free"}, {"warmup_steps": 10}),
            ({"name": "prodigy"}, {"name": "cosine", "warmup_steps": 10}),
            (
                {"name": "d_adapt_sgd"},
                {
                    "name": "warmup_stable_decay",
                    "warmup_steps": 3,
                    "decay_steps": 3,
                    "min_ratio": 0.1,
                },
            ),
            ({"text_encoder_rate": 1e-5, "text_encoder_stop": 0.5}, {}),
        ]
    ),
)
def test_what_agrees_is_left_alone(optimizer: dict[str, Any], schedule: dict[str, Any]):
    assert not rate_problems(
        OptimizerOptions(**optimizer),
        ScheduleOptions(**schedule),
        trains_denoiser=True,
        trains_text=True,
    )


@pytest.mark.parametrize(
    "word", ["lora_plus_ratio", "lora_plus_denoiser_ratio", "lora_plus_text_encoder_ratio"]
)
def test_lora_plus_is_refused_where_the_network_has_no_halves(word: str):
    def problems(fast: tuple[str, ...]) -> list[str]:
        return rate_problems(
            OptimizerOptions(**{word: 16}),
            ScheduleOptions(),
            trains_denoiser=True,
            trains_text=True,
            network="lokr",
            fast=fast,
        )

    assert not problems(("up",))
    (told,) = problems(())
    assert told.startswith(
        f"optimizer.{word} moves one of two halves faster, and network.kind lokr"
    )
