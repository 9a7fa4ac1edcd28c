"""Small jobs over the 24 held-out icons, encoded once for all tests of the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import ROOT, MakeJob, small_job

from raylora.job import Job


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make_job(tmp_path: Path, cache: str) -> MakeJob:
    """A job with a store of this test's own; as `small_job` otherwise."""

    def make(**overrides: object) -> Job:
        given = {
            "data__folder": str(ROOT / "jobs/quickstart/demo-data/holdout"),
            "data__cache": cache,
            **overrides,
        }
        return small_job(str(tmp_path), **given)

    return make


@pytest.fixture
def one_icon(tmp_path: Path) -> str:
    """A folder of this test's own with one image and its caption."""
    folder = tmp_path / "one-icon"
    folder.mkdir()
    for file in (ROOT / "jobs/quickstart/demo-data/holdout").glob("alien.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)
