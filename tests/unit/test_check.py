"""`check_job`: every mistake that can be found before training, at once; the steps arithmetic."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import ROOT, small_job

from raylora.base.errors import JobError
from raylora.check import (
    arithmetic,
    base_problems,
    check_job,
    memory_problems_here,
    memory_warnings,
)
from raylora.diffusion.process import Flow
from raylora.job import Job, job_from

HOLDOUT = str(ROOT / "jobs/quickstart/demo-data/holdout")


def job(folder: Path | str, **more: Any) -> Job:
    return small_job(str(folder), **{"data__folder": HOLDOUT, **more})


def problems(given: Job) -> list[str]:
    with pytest.raises(JobError) as caught:
        check_job(given)
    return caught.value.problems


def test_mistakes_of_base_store_and_images_are_told_together(tmp_path: Path):
    (tmp_path / "file").write_text("")
    found = problems(
        job(
            tmp_path / "file" / "store",
            data__folder=str(tmp_path / "nothing"),
            validation__folder=str(tmp_path / "nor here"),
            data__cache=str(tmp_path / "cache"),
            validation__timesteps=[5000],
            training__max_timestep=2000,
            data__bucket_reso_steps=8,
            preview__prompts=["a cat"],
            preview__width=70,
        )
    )
    starts = [
        "data.bucket_reso_steps is 8; this base needs a multiple of 16",
        "preview.width and height 70x64: this base needs multiples of 16",
        "training.min_timestep 0 and max_timestep 2000: the base has timesteps 0 to 999",
        "validation.timesteps [5000]: the base has timesteps 0 to 999",
    ]
    assert [start for start in starts if not any(p.startswith(start) for p in found)] == []
    assert sum("nothing" in p for p in found) == 1
    assert sum("nor here" in p for p in found) == 1
    assert sum(str(tmp_path / "file" / "store") in p for p in found) == 1
    assert len(found) == 7


def test_a_missing_base_does_not_hide_what_else_is_wrong(tmp_path: Path):
    found = problems(
        job("ftp://somewhere", data__cache=str(tmp_path), family__weights=str(tmp_path / "absent"))
    )
    assert len(found) == 2
    assert "is not there. Give a folder in" in found[0]
    assert "ftp" in found[1]


def test_without_buckets_the_resolution_must_fit_the_base(tmp_path: Path):
    (found,) = problems(job(tmp_path, data__enable_bucket=False, data__resolution=[64, 72]))
    assert found.startswith("data.resolution 64x72: this base needs multiples of 16")


def test_a_good_job_is_opened_and_nothing_is_encoded(tmp_path: Path):
    checked = check_job(job(tmp_path))
    assert checked.warnings == []
    assert [plan.missing("latents") for plan in checked.plans] == [24]
    assert not (tmp_path / "runs").exists()


def test_the_arithmetic_is_told(tmp_path: Path):
    given = job(
        tmp_path,
        training__images_per_step=10,
        training__steps=None,
        training__epochs=2.5,
        validation__folder=HOLDOUT,
    )
    numbers = arithmetic(check_job(given))
    assert numbers["images"] == numbers["images_with_repeats"] == 24
    assert numbers["held_out_images"] == 24
    assert (numbers["steps_per_epoch"], numbers["steps"]) == (3, 8)
    assert numbers["epochs"] == 2.67
    assert sum(numbers["buckets"].values()) == 24
    assert numbers["to_encode"]["images"] == 48
    assert numbers["bad_images"] == 0


def test_repeats_count_as_images_of_an_epoch(tmp_path: Path):
    numbers = arithmetic(check_job(job(tmp_path, data__repeats=3, training__images_per_step=8)))
    assert (numbers["images"], numbers["images_with_repeats"]) == (24, 72)
    assert numbers["steps_per_epoch"] == 9


def test_a_step_larger_than_the_data_set_is_warned_of(tmp_path: Path):
    checked = check_job(job(tmp_path, training__images_per_step=100))
    assert checked.warnings == [
        "training.images_per_step is 100, but an epoch has only 24 images: each step holds 24."
    ]


def test_fp16_on_a_cpu_is_warned_about(tmp_path: Path):
    (warning,) = check_job(job(tmp_path, training__precision="fp16")).warnings
    assert "a CPU computes it slowly" in warning


@pytest.mark.parametrize(
    ("given", "start"),
    [
        (
            {"noise": {"zero_terminal_snr": True, "prediction": "epsilon"}},
            "noise.zero_terminal_snr: the last timestep would be pure noise",
        ),
        ({"loss__v_pred_like": 1.0}, "loss.v_pred_like is 1, which is for models that predict eps"),
        (
            {"noise__prediction": "epsilon", "loss__scale_v_pred_like_noise": True},
            "loss.scale_v_pred_like_noise is for models that predict v",
        ),
        (
            {"noise__zero_terminal_snr": True, "preview__prompts": ["a --ss heun"]},
            "preview.prompts.0.sampler (--ss): heun",
        ),
        ({"log__wandb": {}}, "log.wandb"),
        ({"timesteps__shift": 2.0}, "timesteps.shift is 2.0: a shift is of flow models' sigmas"),
        ({"timesteps__mean": 0.5}, "timesteps.mean is 0.5, which only logit_normal uses, and time"),
        ({"loss__weight__name": "x0"}, "loss.weight.name is x0, a weight of flow models' sigmas"),
        (
            {"loss": {"name": "huber", "huber_scale": 2.0}},
            "loss.huber_scale is 2, which the snr schedule does not use",
        ),
        (
            {"preview__prompts": ["a"], "preview__embedded_guidance": 3.5},
            "preview.embedded_guidance is 3.5, and this base is told no guidance",
        ),
        ({"training__min_timestep": 1000}, "training.min_timestep 1000 and max_timestep 1000"),
        ({"training__max_timestep": 1001}, "training.min_timestep 0 and max_timestep 1001"),
        ({"validation__timesteps": [1000]}, "validation.timesteps [1000]: the base has"),
    ],
    ids=str,
)
def test_what_this_base_cannot_take_is_told_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], start: str
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if "validation__timesteps" in given:
        given = {**given, "validation__folder": HOLDOUT}
    (found,) = problems(job(tmp_path, **given))
    assert found.startswith(start)


def test_an_optimizer_for_gpus_is_refused_where_there_is_none(tmp_path: Path):
    (found,) = problems(job(tmp_path, optimizer={"name": "paged_adamw8bit"}, fleet__cpus_only=True))
    assert "paged_adamw8bit" in found


def test_what_is_seldom_meant_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    given = job(
        tmp_path,
        optimizer={"name": "prodigy", "learning_rate": 1e-4},
        training__precision="bf16",
        fleet__cpus_only=True,
    )
    rate, slow = check_job(given).warnings
    assert "prodigy multiplies it with the rate that it estimates; 1 is usual" in rate
    assert "bf16 on this CPU (AVX2)" in slow


@pytest.mark.parametrize("place", ["", "images"])
def test_a_file_to_start_from_that_is_none_is_told_by_its_option(tmp_path: Path, place: str):
    (tmp_path / "images").mkdir()
    given = str(tmp_path / place) if place else place
    with pytest.raises(
        JobError, match=r"network\.initial is '.*', which is no file. Give a LoRA's"
    ):
        check_job(small_job(str(tmp_path / "store"), network__initial=given))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"schedule__warmup_steps": 4, "schedule__decay_steps": 4}
            | {"schedule__name": "warmup_stable_decay"},
            "schedule.warmup_steps and decay_steps make 8 of the run's 6 steps. Shorten them.",
        ),
        (
            {"optimizer__block_rates": {"down": "zeros", "mid": 0, "up": "zeros"}},
            "No layer is left to train: optimizer.denoiser_rate, text_encoder_rate and block_rates "
            "are 0 for each that network.train and network.layers choose.",
        ),
        (
            {"optimizer__name": "torch.optim:SparseAdam"},
            "optimizer.name is torch.optim:SparseAdam (torch.optim.SparseAdam), whose class cannot "
            "make a step: SparseAdam does not support dense gradients, please consider Adam "
            "instead. Change optimizer.args, or choose another.",
        ),
        (
            {"data__validation_split": 0.01},
            "data.validation_split is 0.01, which holds out none of 24 images. Raise it, or leave "
            "it out.",
        ),
    ],
)
def test_what_the_first_steps_would_find_is_found_before(
    tmp_path: Path, more: dict[str, Any], told: str
):
    assert problems(job(tmp_path, **more)) == [told]


def test_a_file_that_is_no_lora_is_told_under_the_option_that_names_it(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("not a LoRA at all")
    for option in ("network.initial", "family.loras.0.file"):
        path = str(tmp_path / "notes.txt")
        more = {"network__initial": path}
        if option != "network.initial":
            more = {"family__loras": [{"file": path}]}
        (found,) = problems(job(tmp_path, **more))
        assert found.startswith(f"{option} {path}: the file is not a safetensors file.")


def test_a_warm_up_longer_than_the_run_is_warned_of(tmp_path: Path):
    assert check_job(job(tmp_path, schedule__warmup_steps=6)).warnings == [
        "schedule.warmup_steps is 6, and the run has 6 steps: the rate never comes to its peak. "
        "Lower it, e.g. to 0.05, a share of the run."
    ]


def test_a_section_that_does_nothing_is_warned_of_unless_it_is_switched_off_in_words(
    tmp_path: Path,
):
    given = job(tmp_path)
    assert check_job(given).warnings == []
    tree = given.plain()
    tree["validation"] = {"every_steps": 5}
    tree["preview"] = {"sampler": "euler"}
    assert check_job(job_from(tree)).warnings == [
        "validation has every_steps, and nothing is held out. Give validation.folder, or leave "
        "the section out.",
        "preview has sampler, and nothing is drawn. Give preview.prompts, or leave the section "
        "out.",
    ]


def test_held_out_images_that_are_trained_on_are_warned_of(tmp_path: Path):
    (warning,) = check_job(job(tmp_path, validation__folder=f"{HOLDOUT}/")).warnings
    assert warning.startswith(f"validation.folder is {HOLDOUT}, which is trained on too")


def test_what_another_prediction_makes_possible_is_allowed(tmp_path: Path):
    check_job(job(tmp_path, loss__v_pred_like=1.0, noise__prediction="epsilon"))
    check_job(job(tmp_path, training__min_timestep=999, validation__timesteps=[0, 999]))


def test_precisions_that_a_gpu_is_for_are_not_warned_of_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("raylora.check.pick_device", lambda job: torch.device("cuda"))
    for precision in ("fp16", "bf16"):
        assert check_job(job(tmp_path, training__precision=precision)).warnings == []


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ({"noise__offset": 0.1}, "noise.offset is 0.1, and sd15 is a flow model"),
        ({"noise__multires_iterations": 4}, "noise.multires_iterations is 4, and sd15 is a flow"),
        ({"noise__zero_terminal_snr": True}, "noise.zero_terminal_snr is true, and sd15 is a flow"),
        ({"noise__prediction": "epsilon"}, "noise.prediction is epsilon, and sd15 is a flow model"),
        ({"loss__weight__name": "min_snr"}, "loss.weight.name is min_snr, which weighs by the sig"),
        ({"loss__v_pred_like": 1.0}, "loss.v_pred_like is 1.0, which is for models that predict"),
        ({"timesteps__sigmoid_scale": 2.0}, "timesteps.sigmoid_scale is 2, which only sigmoid"),
        ({"training__max_timestep": 1001}, "training.min_timestep 0 and max_timestep 1001"),
        (
            {"preview__prompts": ["a --ss ddim"]},
            "preview.prompts.0.sampler (--ss): ddim is not for flow models. Choose euler or heun.",
        ),
        (
            {"preview__prompts": ["a --n b"], "preview__guidance": None},
            "preview.prompts.0 has a negative prompt, and guidance 1 does not look at it",
        ),
    ],
    ids=str,
)
def test_what_has_no_meaning_for_a_flow_model_is_told(
    tmp_path: Path, given: dict[str, Any], start: str
):
    family: Any = SimpleNamespace(
        process=Flow(),
        size_step=16,
        usual_draw="logit_normal",
        usual_shift="resolution",
        usual_steps=28,
        usual_guidance=1.0,
        usual_sampler="euler",
        usual_embedded_guidance=3.5,
    )
    fine = {
        "noise__input_perturbation": 0.1,
        "loss": {"name": "huber", "weight": {"name": "cosmap"}},
        "timesteps": {"mean": 0.5, "shift": 2.0},
        "training__min_timestep": 200,
        "preview__prompts": ["a --ss heun --g 2"],
    }
    assert base_problems(job(tmp_path, **fine), family) == []
    (found,) = base_problems(job(tmp_path, **given), family)
    assert found.startswith(start)


def test_what_saves_nothing_on_a_cpu_is_warned_of(tmp_path: Path):
    words = {"memory__streaming": 0.5, "memory__host_states": True}
    (warning,) = memory_warnings(small_job(str(tmp_path), **words), torch.device("cpu"))
    assert "memory.streaming and memory.host_states: on a CPU" in warning
    assert not memory_warnings(small_job(str(tmp_path), **words), torch.device("cuda"))
    limited = small_job(str(tmp_path), memory__budget_gib=2, **words)
    assert not memory_warnings(limited, torch.device("cpu"))
    assert not memory_warnings(small_job(str(tmp_path)), torch.device("cpu"))
    recorded = small_job(str(tmp_path), memory__cuda_graphs=True, memory__budget_gib=1.0)
    (warning,) = memory_warnings(recorded, torch.device("cpu"))
    assert "memory.cuda_graphs: a CPU's kernels are not recorded" in warning
    assert not memory_warnings(recorded, torch.device("cuda"))


def test_what_a_machine_lacks_for_smaller_forms_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = small_job(str(tmp_path), memory__base="nf4", memory__states="8bit")
    assert memory_problems_here(job, torch.device("cpu")) == []
    for module in ("raylora.memory.bases.nf4", "raylora.optim.optimizers"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    base, states = memory_problems_here(job, torch.device("cpu"))
    assert "memory.base: nf4 needs the package bitsandbytes" in base
    assert "adamw8bit" in states
