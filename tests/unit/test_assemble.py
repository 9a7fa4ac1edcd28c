"""From a job to a run: lengths, devices, dtypes, shares, and what is worker 0's alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import ROOT, image_row, open_run, small_job

from raylora.assemble import claim, open_store, total_steps
from raylora.base.errors import JobError
from raylora.data.rows import Rows, rows_of
from raylora.data.steps import StepPlan
from raylora.job import Job
from raylora.training.course import Course
from raylora.training.reduce import Alone


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def job(store: Path, cache: str = "", **more: Any) -> Job:
    holdout = str(ROOT / "jobs/quickstart/demo-data/holdout")
    return small_job(str(store), **{"data__folder": holdout, "data__cache": cache or None, **more})


def rows(count: int, **more: Any) -> Rows:
    return rows_of([image_row(f"{i}.png", **more) for i in range(count)])


@pytest.mark.parametrize(
    ("images", "per_step", "epochs", "steps"),
    [(10, 4, 1.0, 3), (10, 4, 2.5, 8), (12, 4, 2.0, 6), (3, 8, 5.0, 5), (10, 1, 0.05, 1)],
)
def test_epochs_become_steps(tmp_path: Path, images: int, per_step: int, epochs: float, steps: int):
    given = job(tmp_path, training__steps=None, training__epochs=epochs)
    assert total_steps(given, StepPlan(rows(images), per_step, 0)) == steps


def test_steps_are_as_asked_whatever_the_data_set(tmp_path: Path):
    assert total_steps(job(tmp_path, training__steps=17), StepPlan(rows(3), 2, 0)) == 17


def test_the_data_sets_name_follows_images_captions_and_repeats():
    first = rows(3).fingerprint()
    assert first == rows(3).fingerprint()
    others = [
        rows(4),
        rows(3, repeats=2),
        rows(3, latents=b"x" * 16),
        rows(3, text=b"x" * 16),
        rows_of([*rows(3)[1:], rows(3)[0]]),
    ]
    assert len({first, *(one.fingerprint() for one in others)}) == 6


@pytest.mark.parametrize(
    ("precision", "activations", "exact"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_precision_is_chosen_once(
    tmp_path: Path, cache: str, precision: str, activations: torch.dtype, exact: torch.dtype
):
    run = open_run(job(tmp_path, cache, training__precision=precision))
    parts = run.parts
    assert parts.dtype == activations
    assert {weight.dtype for weight in parts.denoiser.parameters()} == {activations}
    assert parts.adapter.values.dtype == exact
    assert not any(weight.requires_grad for weight in parts.denoiser.parameters())
    run.close()


def test_parts_follow_the_job(tmp_path: Path, cache: str):
    run = open_run(
        job(
            tmp_path,
            cache,
            training__seed=11,
            training__min_timestep=100,
            training__save_every_steps=5,
            memory__max_micro_batch=3,
            optimizer__max_grad_norm=0.5,
            optimizer__weight_decay=0.25,
            network__layers="attention",
            network__rank=3,
            preview__prompts=["a cat"],
        )
    )
    parts = run.parts
    assert (parts.seed, parts.timesteps.low, parts.timesteps.high) == (11, 100, 1000)
    assert parts.micro_batch == 3
    assert parts.mover.max_grad_norm == 0.5
    assert parts.mover.optimizer.param_groups[0]["weight_decay"] == 0.25
    assert len(parts.mover.optimizer.param_groups[0]["params"]) == 1
    assert all(".attn" in site.name for site in parts.adapter.sites)
    assert len(parts.adapter.parameters[parts.adapter.sites[0].name]["down"]) == 3
    assert run.course.save_every == 5
    assert (run.validation, run.saver, run.reporter) == (None, None, None)
    assert run.previews is not None
    assert parts.device == torch.device("cpu")
    run.close()


def test_only_worker_0_reports_and_saves(tmp_path: Path, cache: str):
    class Second(Alone):
        rank, size = 1, 2

    given = job(tmp_path, cache, fleet__workers=2, fleet__shares=(3.0, 1.0))
    run = open_run(given, Second(), report=True)
    assert (run.saver, run.reporter) == (None, None)
    assert run.parts.shares.pinned
    assert run.parts.shares.weights == [3.0, 1.0]
    run.close()
    first = open_run(given, report=True)
    assert first.saver is not None
    assert first.reporter is not None
    assert first.parts.shares.weights == [1.0], "one worker alone does it all"
    first.close()


def test_first_weights_belong_to_the_seed(tmp_path: Path, cache: str):
    values = []
    for seed in (1, 1, 2):
        run = open_run(job(tmp_path, cache, training__seed=seed))
        values.append(run.parts.adapter.values.detach().clone())
        run.close()
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_a_name_is_claimed_before_anything_is_trained(tmp_path: Path):
    storage, done = claim(job(tmp_path), extend=False)
    assert done is None
    assert storage.url == open_store(job(tmp_path)).url
    assert [entry.key for entry in storage.entries()] == ["job.yaml"]
    with pytest.raises(JobError, match=r"network\.rank was 8, is 2"):
        claim(job(tmp_path, network__rank=2), extend=False)


def test_the_course_follows_the_job(tmp_path: Path, cache: str):
    holdout = str(ROOT / "jobs/quickstart/demo-data/holdout")
    run = open_run(
        job(
            tmp_path,
            cache,
            training__save_every_epochs=2,
            training__keep_best=True,
            validation__folder=holdout,
            validation__every_steps=None,
            validation__every_epochs=3,
            validation__training_images=5,
            validation__patience=4,
            validation__min_delta=0.125,
            preview__every_epochs=1,
            preview__every_steps=None,
            preview__at_start=False,
            fleet__refit_every_steps=7,
            fleet__checksum_every_steps=9,
        )
    )
    epoch = 6  # 24 images, 4 a step
    assert run.course == Course(
        total_steps=6,
        save_every=2 * epoch,
        validate_every=3 * epoch,
        preview_every=epoch,
        preview_first=False,
        refit_every=7,
        checksum_every=9,
        keep_best=True,
        patience=4,
        min_delta=0.125,
    )
    assert run.validation is not None
    told = run.validation.measure(run.parts)
    assert "training" in told, "images that are trained on are measured too"
    run.close()


def test_an_optimizer_that_finds_its_own_rate_is_left_alone(tmp_path: Path, cache: str):
    own, given = {"name": "adafactor"}, {"name": "adafactor", "args": {"relative_step": False}}
    for optimizer, alone in ((own, True), (given, False)):
        run = open_run(
            job(
                tmp_path,
                cache,
                optimizer=optimizer,
                schedule={"name": "adafactor" if alone else "constant"},
            )
        )
        assert (run.parts.mover.rates is None) == alone
        run.close()


def test_a_batchs_weights_are_used_where_there_are_regularisation_images(
    tmp_path: Path, cache: str
):
    folder = str(ROOT / "jobs/quickstart/demo-data/holdout")
    sets = [{"folder": folder}, {"folder": folder, "is_reg": True}]
    for given, factor in (({}, 1.0), ({"data__folder": None, "data__sets": sets}, 0.5)):
        run = open_run(job(tmp_path, cache, **given))
        run.close()
        loss, timesteps = run.parts.loss, torch.tensor([3])
        ones = torch.ones(1, 4, 2, 2)
        assert float(loss(ones, 2 * ones, timesteps, {"weight": torch.tensor([0.5])})) == factor
