"""docs/training.md: made from the code, whole, and readable by who comes from sd-scripts."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import get_args

import pytest
from small import ROOT

from raylora.base.seeds import Purpose
from raylora.job import Job

PAGE = ROOT / "docs" / "training.md"
# What notes on sd-scripts list of train_network.py for SD 1.x: networks, optimizers, schedules,
# losses, noise, texts, previews, validation, saving and reports.
SD_SCRIPTS = """
--network_dim --network_alpha --network_dropout --scale_weight_norms --network_weights
--dim_from_weights --base_weights --base_weights_multiplier --network_train_unet_only
--network_train_text_encoder_only --unet_lr --text_encoder_lr --learning_rate
--optimizer_type --optimizer_args --max_grad_norm --lr_scheduler --lr_scheduler_type
--lr_scheduler_args --lr_warmup_steps --lr_decay_steps --lr_scheduler_num_cycles
--lr_scheduler_power --lr_scheduler_timescale --lr_scheduler_min_lr_ratio
--loss_type --huber_schedule --huber_c --huber_scale --min_snr_gamma --debiased_estimation_loss
--scale_v_pred_loss_like_noise_pred --v_pred_like_loss --v_parameterization --zero_terminal_snr
--noise_offset --noise_offset_random_strength --adaptive_noise_scale --multires_noise_iterations
--multires_noise_discount --ip_noise_gamma --ip_noise_gamma_random_strength --min_timestep
--max_timestep --masked_loss --weighted_captions --max_token_length --clip_skip --vae
--pretrained_model_name_or_path --mixed_precision --gradient_checkpointing
--gradient_accumulation_steps --train_batch_size --max_train_steps --max_train_epochs --seed
--sample_prompts --sample_every_n_steps --sample_every_n_epochs --sample_at_first --sample_sampler
--w --h --d --s --l --n --ss --am --validate_every_n_steps --validate_every_n_epochs
--save_every_n_steps --save_every_n_epochs --save_last_n_steps --save_last_n_epochs
--save_precision --no_metadata --training_comment --metadata_title --metadata_author
--metadata_description --metadata_license --metadata_tags --log_with --logging_dir
"""
NETWORK_ARGS = (
    *("conv_dim", "conv_alpha", "rank_dropout", "module_dropout", "down_lr_weight"),
    *("mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold", "loraplus_lr_ratio"),
    *("loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_training_page")


def test_the_page_of_training_is_the_one_made_from_the_code(program: ModuleType):
    assert PAGE.read_text(encoding="utf-8") == program.training_page(), (
        "Run `python docs/make_training_page.py` and commit docs/training.md."
    )


def entries(page: str) -> dict[str, str]:
    """Option -> what the page says of it."""
    found = re.split(r"^#### (\S+).*$", page.partition("## Every draw")[0], flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def test_every_option_of_training_is_told_with_its_default(program: ModuleType):
    told = entries(program.training_page())
    job = Job.model_validate(
        {
            "name": "x",
            "family": {"kind": "sd15", "weights": "base"},
            "data": {"folder": "images"},
            "training": {"steps": 1},
        }
    ).plain()
    places = []
    for section in program.SECTIONS:
        if section not in job:
            continue
        for word, value in job[section].items():
            if isinstance(value, dict) and value and f"{section}.{word}" not in told:
                places += [f"{section}.{word}.{inner}" for inner in value]
            else:
                places.append(f"{section}.{word}")
    assert len(places) > 100
    assert [place for place in places if place not in told] == []
    first = {place: text.strip().partition("\n\n")[0] for place, text in told.items()}
    without = [
        p for p, text in first.items() if not re.search(r"default\s+`|must be\s+given", text)
    ]
    assert without == []
    for place, shown in (
        ("preview.steps", "default `null`"),
        ("noise.offset", "default `0.0`"),
        ("family.weights", "must be given"),
        ("preview.prompts.N.seed", "default `null`"),
        ("network.conv_rank", "default `null`"),
    ):
        assert shown in first[place], place


def test_every_training_option_of_sd_scripts_leads_to_ours(program: ModuleType):
    page = program.training_page()
    table = page.partition("| sd-scripts | raylora |")[2].partition("## The options")[0]
    named = set(re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE))
    wanted = {*SD_SCRIPTS.split(), *(f"--network_args {word}" for word in NETWORK_ARGS)}
    assert sorted(wanted - named) == []


def test_what_is_said_of_an_option_is_all_on_the_page(program: ModuleType):
    told = " ".join(entries(program.training_page())["noise.offset"].split())
    for piece in (
        "Formula: `noise + offset N(0, 1), one number a channel`",
        "Source: Guttenberg 2023",
        "sd-scripts: `--noise_offset`",
        "Guides: noise offset",
    ):
        assert piece in told


def test_names_said_in_the_program_are_of_options_that_exist(program: ModuleType):
    assert set(program.SAID_HERE) <= entries(program.training_page()).keys()


def test_every_purpose_of_random_numbers_has_its_row(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    listed = set(program.DRAWS) | set(program.UNLISTED)
    assert listed == set(get_args(Purpose))
    table = program.training_page().partition("## Every draw")[2]
    for name in program.DRAWS:
        assert f"\n| {name} | " in table
    monkeypatch.delitem(program.DRAWS, "noise")
    with pytest.raises(AssertionError, match=r"write a row of DRAWS for each of \['noise'\]"):
        program.training_page()
