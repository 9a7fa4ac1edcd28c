"""The ready jobs: one for each family and size of card, all of which can be trained as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from bases import random_folder
from programs import ROOT, load_program

from raylora.base.lookup import plugins
from raylora.check import check_job
from raylora.job import load_job, with_overrides
from raylora.weights.short_names import SHORT_NAMES

JOBS = ROOT / "jobs"


MAKER = load_program("jobs/make_card_jobs.py")
TEXTS = dict(MAKER.card_jobs())


def test_there_is_one_for_each_family_and_size_of_card():
    sizes = (8, 12, 16, 24, 48, 80)
    wanted = {f"{kind}_{size}gb.yaml" for kind in plugins("raylora.families") for size in sizes}
    assert set(TEXTS) == wanted


@pytest.mark.parametrize("name", TEXTS)
def test_the_file_is_what_its_program_writes(name: str):
    assert (JOBS / name).read_text() == TEXTS[name]


@pytest.mark.parametrize("name", TEXTS)
def test_its_short_name_is_a_base_of_its_family(name: str):
    job = load_job(JOBS / name)
    assert SHORT_NAMES[job.family.weights].kind == job.family.kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", plugins("raylora.families"))
def test_it_passes_the_check_on_a_base_of_its_family(kind: str, tmp_path: Path):
    for size in MAKER.SIZES:
        job = with_overrides(
            load_job(JOBS / f"{kind}_{size}gb.yaml"),
            {
                "family.weights": str(random_folder(kind)),
                "data.folder": str(JOBS / "quickstart" / "demo-data" / "holdout"),
                "store": str(tmp_path),
            },
        )
        assert check_job(job).plans
