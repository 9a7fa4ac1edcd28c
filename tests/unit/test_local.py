"""The road without Ray: what is encoded, and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small import ROOT, small_job

from raylora.base.errors import TrainingError
from raylora.check import check_job
from raylora.job import Job, load_job, with_overrides
from raylora.local import cache_here, refuse_stopped, train
from raylora.training.loop import Outcome

HOLDOUT = str(ROOT / "jobs/quickstart/demo-data/holdout")


def job(store: Path, **more: Any) -> Job:
    return small_job(str(store), **{"data__folder": HOLDOUT, **more})


@pytest.mark.slow
def test_a_second_time_no_encoder_is_loaded(tmp_path: Path):
    first = cache_here(check_job(job(tmp_path)))
    checked = check_job(job(tmp_path, name="other"))
    assert [len(plan.items) for plan in checked.plans] == [0]

    def refuse(**_: Any) -> Any:
        raise AssertionError("an encoder was loaded")

    checked.family.load_encoder = refuse  # type: ignore[method-assign]
    again = cache_here(checked)
    assert list(again.training.rows) == list(first.training.rows)
    assert again.training.rows.fingerprint() == first.training.rows.fingerprint()
    assert again.validation is None


@pytest.mark.slow
def test_progress_reaches_every_sink(tmp_path: Path):
    told: list[dict[str, Any]] = []
    given = job(tmp_path, training__steps=2, log__every_steps=1)
    result = train(given, sinks=[told.append, told.append], prove=False)
    assert result["steps"] == 2
    assert [row["done"] for row in told if "images_per_second" in row] == [1, 1, 2, 2]
    assert [row["event"] for row in told[::2] if "event" in row] == ["started", "saved", "trained"]


def test_a_run_that_was_stopped_is_not_finished():
    refuse_stopped(Outcome(5, stopped=False, validation=None))
    with pytest.raises(TrainingError, match="stopped at step 5 as asked; the same command goes on"):
        refuse_stopped(Outcome(5, stopped=True, validation=None))


@pytest.mark.slow
def test_the_guides_job_trains_once_its_places_are_filled_in(tmp_path: Path):
    """Smaller pictures, fp32 and one image in four held out are all that differs."""
    small = {
        "store": str(tmp_path),
        "family.weights": str(ROOT / "jobs/quickstart/tiny-sd"),
        "data.folder": HOLDOUT,
        "data.resolution": 64,
        "data.bucket_reso_steps": 16,
        "data.min_bucket_reso": 48,
        "data.max_bucket_reso": 80,
        "data.validation_split": 0.25,
        "training.epochs": 1,
        "training.precision": "fp32",
        "preview.prompts": ["ink icon, dog face --w 64 --h 64 --l 6 --s 2 --d 7"],
        "fleet.cpus_only": True,
    }
    guide = with_overrides(load_job(ROOT / "jobs" / "sd15_guide.yaml"), small)
    result = train(guide)
    assert result["steps"] == 5  # 18 images, 4 a step
    made = {path.name for path in (tmp_path / "runs" / "my-style").iterdir()}
    assert {"my-style.safetensors", "samples.png", "curves.png", "tensorboard"} <= made
    recorded = load_job(tmp_path / "runs/my-style/job.yaml")
    assert isinstance(recorded.training.seed, int)
