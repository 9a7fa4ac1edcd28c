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
NAMES = [f"{kind}_{size}gb.yaml" for kind in MAKER.BASES for size in MAKER.SIZES]


def test_there_is_one_for_each_family_and_size_of_card():
    sizes = (8, 12, 16, 24, 48, 80)
    wanted = {f"{kind}_{size}gb.yaml" for kind in plugins("raylora.families") for size in sizes}
    assert set(NAMES) == wanted
    assert {path.name for path in JOBS.glob("*_*gb.yaml")} == wanted


@pytest.mark.slow
def test_the_files_are_what_their_program_writes():
    """What they say of their cards is what the planner chooses today."""
    for name, text in MAKER.card_jobs():
        assert (JOBS / name).read_text() == text, (
            f"{name}: run `python jobs/make_card_jobs.py` and commit the jobs."
        )


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_was_predicted_and_that_nothing_was_measured(name: str):
    size = int(name.partition("_")[2].removesuffix("gb.yaml"))
    told = " ".join(
        line.removeprefix("# ")
        for line in (JOBS / name).read_text().splitlines()
        if line.startswith("#")
    )
    assert f"Predicted for {MAKER.PLANNED_FOR[size]}" in told
    assert "not measured" in told


@pytest.mark.parametrize("name", NAMES)
def test_its_short_name_is_a_base_of_its_family(name: str):
    job = load_job(JOBS / name)
    assert SHORT_NAMES[job.family.weights].kind == job.family.kind


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_to_the_planner_what_fits_its_card(name: str):
    memory = load_job(JOBS / name).memory
    assert (memory.base, memory.checkpointing, memory.streaming) == ("auto", "auto", "auto")
    assert memory.max_micro_batch is None


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
