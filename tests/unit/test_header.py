"""Facts of a run's LoRA file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from small import ROOT, image_row, small_job

from raylora.adapt.metadata import AdapterFacts, adapter_metadata
from raylora.assemble import open_family
from raylora.data.dataset import Dataset, PlanFacts
from raylora.data.rows import Row, rows_of
from raylora.data.steps import StepPlan
from raylora.header import adapter_facts, image_facts
from raylora.job import job_from


def row(key: str, repeats: int, bucket: tuple[int, int], caption: str) -> Row:
    return image_row(key, repeats=repeats, bucket=bucket, caption=caption, size=(100, 50))


ROWS = rows_of(
    [
        row("3_cats/a.png", 3, (80, 48), "cat, black, cat"),
        row("3_cats/b.png", 3, (64, 64), "cat"),
        row("c.png", 1, (64, 64), ""),
    ]
)


def facts(tmp_path: Path, step: int = 5, **more: Any) -> AdapterFacts:
    job = small_job(str(tmp_path), data__folder=f"{tmp_path}/images", **more)
    facts = PlanFacts(job.data, job.sets, "", "", "", (f"file://{tmp_path}/images",), ("",))
    dataset = Dataset(ROWS, (), facts)
    plan = StepPlan(ROWS, job.training.images_per_step, 0)
    return adapter_facts(
        job,
        open_family(job),
        dataset,
        plan,
        image_facts(job, dataset),
        held_out=3 if job.validation.folder else 0,
        step=step,
        total_steps=6,
        started_at=1000.0,
        now=1060.0,
    )


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
