"""Where a submitted job's results go."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylora.on_ray.submitted import keep_results


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as Ray makes it for a submitted job, with a job file and a space in it."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text("name: a\nstore: mine\n")
    (folder / "far.yaml").write_text("name: a\nstore: s3://bucket/far\n")
    (folder / "space.yaml").write_text("name: b\njob: job.yaml\n")
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path / "home"))
    return folder


@pytest.mark.parametrize(
    ("arguments", "store"),
    [
        (["job.yaml"], "mine"),
        (["--set", "training.steps=4", "job.yaml"], "mine"),
        (["job.yaml", "--set", "store=other"], "other"),
        (["job.yaml", "--set=store=other", "--json"], "other"),
        (["space.yaml"], "mine"),
        (["missing.yaml"], "results"),
    ],
)
def test_a_relative_store_moves_out_of_the_unpacked_folder(
    tmp_path: Path, unpacked: Path, arguments: list[str], store: str
) -> None:
    kept = keep_results(arguments, unpacked)
    assert kept == [*arguments, "--set", f"store={tmp_path / 'home' / store}"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["far.yaml"],
        ["job.yaml", "--set", "store=/shared/results"],
        ["space.yaml", "--job", "far.yaml"],
    ],
)
def test_a_store_that_lasts_stays(unpacked: Path, arguments: list[str]) -> None:
    assert keep_results(arguments, unpacked) == arguments


def test_outside_a_submitted_job_nothing_changes(tmp_path: Path) -> None:
    assert keep_results(["job.yaml"], tmp_path) == ["job.yaml"]


def test_without_a_home_results_go_to_the_persons_own(
    unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYLORA_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert keep_results(["job.yaml"], unpacked)[-1] == "store=/home/someone/raylora-results/mine"
