"""`raylora plan --measure`: two real steps without images, beside what was predicted of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bases import random_folder
from small import small_job

from raylora.base.errors import UserError
from raylora.rehearse import rehearse


def job_of(tmp_path: Path, kind: str, **more: Any) -> Any:
    return small_job(
        str(tmp_path),
        family={"kind": kind, "weights": str(random_folder(kind))},
        optimizer__text_encoder_rate=None,
        memory__reserve_gib=0.0,
        memory__budget_gib=1.0,
        data__folder=str(tmp_path / "no images"),
        **more,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux1"])
def test_what_is_observed_is_what_was_predicted(kind: str, tmp_path: Path) -> None:
    found = rehearse(job_of(tmp_path, kind, memory__max_micro_batch=2), (128, 128))
    assert found["setting"]["micro_batch"] == 2
    assert found["observed_seconds_per_image"] > 0
    # The batch's own copy is counted, which a CPU does not make: a little too much is predicted.
    assert found["observed_peak_bytes"] == pytest.approx(found["predicted_peak_bytes"], rel=0.1)


@pytest.mark.slow
def test_captions_of_trained_text_encoders_are_tokens(tmp_path: Path) -> None:
    job = job_of(tmp_path, "sdxl", network__train="both")
    assert rehearse(job, (128, 128))["observed_peak_bytes"] > 0


def test_without_a_limit_there_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no GPU here to measure on"):
        rehearse(
            job_of(tmp_path, "sd15").model_copy(update={"memory": small_job(str(tmp_path)).memory}),
            (128, 128),
        )
