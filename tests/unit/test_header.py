"""Facts of a run's LoRA file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from adapters import GOLDEN
from small import ROOT, image_row, small_job

from raylora.adapt.metadata import AdapterFacts, adapter_metadata
from raylora.data.dataset import Dataset, PlanFacts
from raylora.data.rows import Row, rows_of
from raylora.data.steps import StepPlan
from raylora.diffusion.process import Flow
from raylora.header import adapter_facts, image_facts
from raylora.job import job_from
from raylora.models import open_family


def row(key: str, repeats: int, bucket: tuple[int, int], caption: str) -> Row:
    return image_row(key, repeats=repeats, bucket=bucket, caption=caption, size=(100, 50))


ROWS = rows_of(
    [
        row("3_cats/a.png", 3, (80, 48), "cat, black, cat"),
        row("3_cats/b.png", 3, (64, 64), "cat"),
        row("c.png", 1, (64, 64), ""),
    ]
)


def facts(
    tmp_path: Path,
    step: int = 5,
    base_license: str = "",
    family: Any = None,
    **more: Any,
) -> AdapterFacts:
    job = small_job(str(tmp_path), data__folder=f"{tmp_path}/images", **more)
    facts = PlanFacts(job.data, job.sets, "", "", "", (f"file://{tmp_path}/images",), ("",))
    dataset = Dataset(ROWS, (), facts)
    plan = StepPlan(ROWS, job.training.images_per_step, 0)
    return adapter_facts(
        job,
        family or open_family(job),
        dataset,
        plan,
        image_facts(job, dataset),
        held_out=3 if job.validation.folder else 0,
        step=step,
        total_steps=6,
        started_at=1000.0,
        now=1060.0,
        base_license=base_license,
    )


def words(tmp_path: Path, **more: Any) -> dict[str, str]:
    return adapter_metadata(facts(tmp_path, **more))


def test_the_job_comes_back_from_the_header(tmp_path: Path):
    words = adapter_metadata(facts(tmp_path, name="cats", network__alpha=2.0))
    job = small_job(
        str(tmp_path), data__folder=f"{tmp_path}/images", name="cats", network__alpha=2.0
    )
    assert job_from(json.loads(words["raylora.job"])) == job
    assert words["ss_output_name"] == words["modelspec.title"] == "cats"
    assert (words["ss_network_dim"], float(words["ss_network_alpha"])) == ("8", 2.0)


def test_strength_without_an_alpha_is_the_rank(tmp_path: Path):
    assert facts(tmp_path).alpha == 8.0


def test_images_and_epochs_count_repeats(tmp_path: Path):
    found = facts(tmp_path, step=5)
    assert found.train_images == 7
    assert found.batches_per_epoch == 2
    assert (found.epoch, found.epochs) == (3, 3)
    assert facts(tmp_path, step=4).epoch == 2


def test_folders_tags_and_buckets_are_counted(tmp_path: Path):
    found = facts(tmp_path)
    assert found.dataset_folders == {
        "3_cats": {"n_repeats": 3, "img_count": 2},
        "images": {"n_repeats": 1, "img_count": 1},
    }
    assert found.tag_frequency == {"3_cats": {"cat": 3, "black": 1}, "images": {}}
    assert found.bucket_info["buckets"] == {
        "0": {"resolution": [64, 64], "count": 4},
        "1": {"resolution": [80, 48], "count": 3},
    }
    errors = [abs(2 - 80 / 48), 1.0, 1.0]
    assert found.bucket_info["mean_img_ar_error"] == sum(errors) / 3


def test_what_predicts_v_says_so(tmp_path: Path):
    found = facts(tmp_path)
    assert found.prediction_type == "v"
    assert found.architecture == "stable-diffusion-v1/lora"
    assert found.base_name == "tiny-sd"


def test_min_snr_is_named_only_where_it_weighs(tmp_path: Path):
    assert facts(tmp_path).min_snr_gamma is None
    weighted = facts(tmp_path, loss__weight__name="min_snr", loss__weight__gamma=3.0)
    assert weighted.min_snr_gamma == 3.0


def test_validation_is_named_only_where_there_is_some(tmp_path: Path):
    assert facts(tmp_path).validate_every_steps is None
    folder = str(ROOT / "jobs/quickstart/demo-data/holdout")
    held_out = facts(tmp_path, validation__folder=folder, validation__every_steps=9)
    assert held_out.validate_every_steps == 9
    assert (facts(tmp_path).validation_images, held_out.validation_images) == (0, 3)


@pytest.mark.parametrize(
    ("file", "job"),
    [
        ("default_te_unet_dim8", {"network__train": "both"}),
        (
            "rich_options",
            {
                "network__kind": "locon",
                "network__conv_rank": 4,
                "network__conv_alpha": 1.0,
                "family__clip_skip": 2,
                "export__author": "A. Person",
            },
        ),
    ],
)
def test_a_jobs_file_has_exactly_the_words_of_sd_scripts_file(
    file: str, job: dict[str, Any], tmp_path: Path
):
    theirs = set(json.loads((GOLDEN / "metadata_keys.json").read_text())[file])
    ours = {word for word in words(tmp_path, **job) if not word.startswith("raylora.")}
    # The two hashes are added when the file is made.
    assert ours == theirs - {"sshs_legacy_hash", "sshs_model_hash"}


def test_a_plain_lora_has_no_network_args(tmp_path: Path):
    found = words(tmp_path, network__layers="attention")
    assert "ss_network_args" not in found
    assert found["ss_network_module"] == "networks.lora"
    for word in ("network_dropout", "scale_weight_norms", "text_encoder_lr", "min_snr_gamma"):
        assert found[f"ss_{word}"] == "None"


def test_network_options_are_sd_scripts_arguments(tmp_path: Path):
    found = words(
        tmp_path,
        network__kind="locon",
        network__conv_rank=4,
        network__conv_alpha=0.5,
        network__dropout=0.1,
        network__rank_dropout=0.25,
        network__module_dropout=0.5,
        network__max_norm=1.5,
        optimizer__lora_plus_ratio=16.0,
        optimizer__block_rates__down="sine+0.25",
        optimizer__block_rates__up=[1, 0.5, 0.25],
    )
    assert json.loads(found["ss_network_args"]) == {
        "conv_dim": "4",
        "conv_alpha": "0.5",
        "rank_dropout": "0.25",
        "module_dropout": "0.5",
        "loraplus_lr_ratio": "16",
        "down_lr_weight": "sine+0.25",
        "up_lr_weight": "1,0.5,0.25",
    }
    assert found["ss_network_module"] == "networks.lora"
    assert found["ss_network_dropout"] == "0.1"
    assert found["ss_scale_weight_norms"] == "1.5"


def test_a_locon_without_more_says_what_its_convolutions_have(tmp_path: Path):
    found = words(tmp_path, network__kind="locon")
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "8", "conv_alpha": "8"}


def test_ranks_of_a_file_are_not_the_jobs(tmp_path: Path):
    more = {"network__initial": "a.safetensors", "network__initial_ranks": True}
    more |= {"network__rank": 16}  # as where a job says nothing
    found = words(tmp_path, **more)
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "None"


def test_rates_are_those_of_what_is_trained(tmp_path: Path):
    rates = {
        "optimizer__learning_rate": None,
        "optimizer__denoiser_rate": 5e-4,
        "optimizer__text_encoder_rate": 5e-5,
    }
    both = words(tmp_path, network__train="both", **rates)
    assert both["ss_learning_rate"] == "0.0001"
    assert both["ss_unet_lr"] == "0.0005"
    assert both["ss_text_encoder_lr"] == "[5e-05]"
    alone = {name: rates[name] for name in rates if "denoiser" not in name}
    text = words(tmp_path, network__train="text_encoder", **alone)
    assert (text["ss_unet_lr"], text["ss_text_encoder_lr"]) == ("None", "[5e-05]")


def test_optimizer_and_schedule_are_named_as_classes_with_arguments(tmp_path: Path):
    found = words(
        tmp_path,
        optimizer__max_grad_norm=0,
        optimizer__weight_decay=0.1,
        optimizer__args={"amsgrad": True},
        schedule__name="constant_with_warmup",
        schedule__warmup_steps=0.1,
    )
    assert found["ss_optimizer"].startswith("torch.optim.AdamW(")
    assert "weight_decay=0.1,amsgrad=True" in found["ss_optimizer"]
    assert found["ss_lr_scheduler"] == "constant_with_warmup"
    assert found["ss_lr_warmup_steps"] == "0.1"
    assert found["ss_max_grad_norm"] == "0.0"


@pytest.mark.parametrize(
    ("precision", "word"), [("fp32", "no"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp64", "no")]
)
def test_precision_and_memory_are_told(precision: str, word: str, tmp_path: Path):
    more = {"training__precision": precision, "memory__checkpointing": "all"}
    found = words(tmp_path, **more)
    assert found["ss_mixed_precision"] == word
    assert found["ss_gradient_checkpointing"] == "True"


def test_losses_are_told(tmp_path: Path):
    curved = words(
        tmp_path,
        loss__name="smooth_l1",
        loss__huber_schedule="exponential",
        loss__huber_c=0.2,
        loss__huber_scale=2.0,
        loss__weight__name="debiased",
    )
    told = {"loss_type": "smooth_l1", "huber_schedule": "exponential", "huber_c": "0.2"}
    told |= {"huber_scale": "2.0", "debiased_estimation": "True", "min_snr_gamma": "None"}
    assert {word: curved[f"ss_{word}"] for word in told} == told


def test_noise_is_told_and_what_is_off_is_none(tmp_path: Path):
    off = words(tmp_path)
    told = {
        "noise_offset": "None",
        "noise_offset_random_strength": "False",
        "adaptive_noise_scale": "None",
        "multires_noise_iterations": "None",
        "multires_noise_discount": "0.3",
        "ip_noise_gamma": "None",
        "ip_noise_gamma_random_strength": "False",
        "zero_terminal_snr": "False",
    }
    assert {word: off[f"ss_{word}"] for word in told} == told
    offset = words(
        tmp_path,
        noise__offset=0.05,
        noise__offset_random=True,
        noise__adaptive_scale=0.01,
        noise__input_perturbation=0.1,
        noise__input_perturbation_random=True,
    )
    told |= {
        "noise_offset": "0.05",
        "noise_offset_random_strength": "True",
        "adaptive_noise_scale": "0.01",
        "ip_noise_gamma": "0.1",
        "ip_noise_gamma_random_strength": "True",
    }
    assert {word: offset[f"ss_{word}"] for word in told} == told
    pyramid = words(tmp_path, noise__multires_iterations=6, noise__multires_discount=0.2)
    assert pyramid["ss_multires_noise_iterations"] == "6"
    assert pyramid["ss_multires_noise_discount"] == "0.2"


def test_the_jobs_own_prediction_is_told(tmp_path: Path):
    assert facts(tmp_path, noise__prediction="epsilon").prediction_type == "epsilon"
    assert facts(tmp_path, noise__prediction="v_prediction").prediction_type == "v"


def test_only_a_narrowed_range_of_timesteps_is_told(tmp_path: Path):
    assert "modelspec.timestep_range" not in words(tmp_path)
    steps = words(tmp_path, training__min_timestep=200)
    assert steps["modelspec.timestep_range"] == "200,1000"
    below = words(tmp_path, training__max_timestep=500)
    assert below["modelspec.timestep_range"] == "0,500"


def test_what_the_job_says_about_the_file_is_in_modelspec(tmp_path: Path):
    told = {
        "title": "Cats",
        "author": "A. Person",
        "description": "Black cats.",
        "license": "cc0-1.0",
        "trigger_phrase": "blk cat",
        "usage_hint": "strength 0.8",
    }
    more = {f"export__{word}": text for word, text in told.items()}
    found = words(
        tmp_path,
        base_license="openrail",
        export__tags=["cat", "black"],
        export__comment="second try",
        **more,
    )
    assert {word: found[f"modelspec.{word}"] for word in told} == told
    assert found["modelspec.tags"] == "cat, black"
    assert found["ss_training_comment"] == "second try"


def test_the_bases_licence_is_the_files_where_the_job_names_none(tmp_path: Path):
    assert words(tmp_path, base_license="openrail")["modelspec.license"] == "openrail"
    assert "modelspec.license" not in words(tmp_path)


def test_minimal_metadata_tells_the_kind_of_file_and_nothing_of_the_job(tmp_path: Path):
    found = words(tmp_path, export__metadata="minimal", export__author="A.", network__kind="locon")
    assert {word for word in found if not word.startswith("modelspec.")} == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    }
    assert found["modelspec.author"] == "A."
    plain = words(tmp_path, export__metadata="minimal")
    assert "ss_network_args" not in plain


def test_a_vae_of_the_jobs_own_is_named(tmp_path: Path):
    assert "ss_vae_name" not in words(tmp_path)
    vae = str(ROOT / "jobs/quickstart/tiny-sd/vae")
    assert words(tmp_path, family__vae=vae)["ss_vae_name"] == "vae"


def test_a_split_of_the_images_names_its_seed(tmp_path: Path):
    assert words(tmp_path)["ss_validation_seed"] == "None"
    found = words(tmp_path, data__validation_split=0.25, data__validation_seed=3)
    assert (found["ss_validation_split"], found["ss_validation_seed"]) == ("0.25", "3")


def test_crops_around_faces_are_told_as_typed(tmp_path: Path):
    found = words(
        tmp_path, data__cache="none", data__fit="crop", data__face_crop_aug_range=[2.0, 4.5]
    )
    assert found["ss_face_crop_aug_range"] == "2,4.5"


# -- flow models


def flow(tmp_path: Path, *, flux: bool) -> Any:
    """The tiny base in a flow model's clothes."""
    family = open_family(small_job(str(tmp_path)))
    family.process = Flow()
    family.usual_draw, family.usual_shift = "logit_normal", "resolution" if flux else "base"
    of_flux = {"ss_guidance_scale": "1.0", "ss_model_type": "flux"} if flux else {}
    family.metadata = {**family.metadata, "ss_apply_t5_attn_mask": "False", **of_flux}
    family.base = SimpleNamespace(config=lambda component: {"shift": 3.0})  # type: ignore[assignment]
    return family


def flow_words(tmp_path: Path, *, flux: bool = True, **more: Any) -> dict[str, str]:
    return adapter_metadata(facts(tmp_path, family=flow(tmp_path, flux=flux), **more))


def test_a_flow_model_predicts_what_modelspec_has_no_word_for(tmp_path: Path):
    assert "modelspec.prediction_type" not in flow_words(tmp_path)
    assert flow_words(tmp_path, loss__name="huber")["ss_huber_schedule"] == "exponential"
    assert words(tmp_path, loss__name="huber")["ss_huber_schedule"] == "snr"


def test_words_of_flow_models_are_written_for_them_alone(tmp_path: Path):
    both = {"ss_weighting_scheme", "ss_logit_mean", "ss_logit_std", "ss_mode_scale"}
    both |= {"ss_apply_t5_attn_mask"}
    of_flux = {"ss_model_type", "ss_guidance_scale", "ss_timestep_sampling", "ss_sigmoid_scale"}
    of_flux |= {"ss_model_prediction_type", "ss_discrete_flow_shift"}
    plain = words(tmp_path).keys()
    assert flow_words(tmp_path, flux=False).keys() - plain == both
    assert flow_words(tmp_path, flux=True).keys() - plain == both | of_flux
    assert flow_words(tmp_path)["ss_model_prediction_type"] == "raw"


@pytest.mark.parametrize(
    ("given", "sampling", "scheme", "shift"),
    [
        ({}, "flux_shift", "logit_normal", "3.0"),
        ({"timesteps": {"draw": "sigmoid", "shift": 1}}, "sigmoid", "none", "1.0"),
        ({"timesteps": {"draw": "sigmoid", "shift": 3.16}}, "shift", "none", "3.16"),
        ({"timesteps": {"draw": "sigmoid", "shift": "base"}}, "shift", "none", "3.0"),
        ({"timesteps": {"draw": "uniform", "shift": 1}}, "uniform", "none", "1.0"),
        ({"timesteps": {"mean": 0.5, "shift": 1}}, "sigma", "logit_normal", "1.0"),
        ({"timesteps": {"draw": "mode", "shift": 1}}, "sigma", "mode", "1.0"),
        ({"loss__weight__name": "sigma_sqrt"}, "flux_shift", "sigma_sqrt", "3.0"),
    ],
    ids=str,
)
def test_timesteps_are_told_in_the_nearest_words_of_sd_scripts(
    tmp_path: Path, given: dict[str, Any], sampling: str, scheme: str, shift: str
):
    found = flow_words(tmp_path, **given)
    told = ("ss_timestep_sampling", "ss_weighting_scheme", "ss_discrete_flow_shift")
    assert [found[word] for word in told] == [sampling, scheme, shift]


@pytest.mark.parametrize(
    ("network", "module", "args"),
    [
        ({"kind": "lora"}, "networks.lora", {}),
        ({"kind": "dylora", "unit": 2}, "networks.dylora", {"unit": "2"}),
        ({"kind": "loha"}, "lycoris.kohya", {"algo": "loha"}),
        ({"kind": "dora"}, "lycoris.kohya", {"algo": "lora", "dora_wd": "True"}),
        ({"kind": "oft"}, "lycoris.kohya", {"algo": "diag-oft"}),
        ({"kind": "lycoris", "algo": "boft"}, "lycoris.kohya", {"algo": "boft"}),
        ({"kind": "lycoris", "algo": "norms"}, "lycoris.kohya", {"train_norm": "True"}),
    ],
    ids=str,
)
def test_the_network_is_told_in_the_words_of_whatever_makes_such_a_file(
    tmp_path: Path, network: dict[str, Any], module: str, args: dict[str, str]
):
    found = words(tmp_path, network=network)
    assert found["ss_network_module"] == module
    held = json.loads(found.get("ss_network_args", "{}"))
    assert held.items() >= args.items()
