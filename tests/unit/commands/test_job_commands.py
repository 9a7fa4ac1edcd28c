"""`train --local`, `check`, `cache --local`, `replay` and `schema`, as a person calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small import ROOT, small_job

from raylora.cli import DONE, MISTAKE, run
from raylora.job import Job


@pytest.fixture
def job(tmp_path: Path) -> str:
    """A job file of two steps over 24 images."""
    given = small_job(
        str(tmp_path / "store"),
        name="two-steps",
        data__folder=str(ROOT / "jobs/quickstart/demo-data/holdout"),
        training__steps=2,
    )
    path = tmp_path / "job.yaml"
    path.write_text(given.model_dump_json())
    return str(path)


class NoProof:
    def start(self) -> None: ...

    def prove(self, *_: Any) -> None: ...

    def close(self) -> None: ...


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """(exit code, the JSON document, standard error)."""
    code = run([*arguments, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


@pytest.mark.slow
def test_a_job_is_trained_found_finished_and_replayed(
    job: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    assert run(["train", job, "--local"]) == DONE
    captured = capsys.readouterr()
    folder = captured.out.splitlines()[-1]
    assert folder == str(tmp_path / "store/runs/two-steps")
    assert "24 images" in captured.err or "24 (0 bad, left out)" in captured.err
    assert Path(folder, "two-steps.safetensors").is_file()

    code, document, _ = call(capsys, "train", job, "--local")
    assert code == DONE
    assert document["already_done"] is True
    assert document["folder"] == f"file://{folder}"

    code, document, err = call(capsys, "train", job, "--local", "--set", "network.rank=2")
    assert code == MISTAKE
    assert "network.rank was 8, is 2" in document["error"]
    assert document["error"] in err

    data = json.loads(Path(job).read_text())["data"]["folder"]
    shutil.copytree(data, tmp_path / "copy")
    there = ("train", job, "--local", "--set", f"data.folder={tmp_path / 'copy'}")
    code, document, _ = call(capsys, *there)
    assert (code, "add --moved" in document["error"]) == (MISTAKE, True)
    assert call(capsys, *there, "--moved")[0] == DONE
    assert call(capsys, "train", job, "--local", "--moved")[0] == DONE

    monkeypatch.setattr("raylora.assemble.ExportProver", NoProof)  # one proof is enough here
    code, document, _ = call(
        capsys, "train", job, "--local", "--extend", "--set", "training.steps=3"
    )
    assert (code, document["steps"]) == (DONE, 3)

    code, document, _ = call(capsys, "replay", job, "--step", "2", "--set", "training.steps=3")
    assert code == DONE
    assert document["recorded"] == document["replayed"]
    assert len(document["keys"]) == 4
    assert run(["replay", job, "--step", "2", "--set", "training.steps=3"]) == DONE
    told = capsys.readouterr().out.splitlines()
    assert told[:-1] == document["keys"]
    assert told[-1].startswith("step 2: loss recorded 0.")
    assert run(["replay", job, "--step", "9", "--set", "training.steps=3"]) == MISTAKE
    assert "step 9 is not recorded: the run has steps 1 to 3" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cache_is_made_once(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, document, _ = call(capsys, "cache", job, "--local")
    assert (code, document["images"], document["bad"]) == (DONE, 24, [])
    assert document["encoded"]["images"] == 24
    assert document["cache"] == str(tmp_path / "store/caches")
    code, document, _ = call(capsys, "cache", job, "--local")
    assert (code, document["encoded"]) == (DONE, {"images": 0, "captions": 0})
    assert run(["cache", job, "--local"]) == DONE
    assert f"24 images cached in {tmp_path}/store/caches" in capsys.readouterr().out


def test_a_good_job_is_ok_and_its_arithmetic_told(job: str, capsys: pytest.CaptureFixture[str]):
    assert run(["check", job]) == DONE
    captured = capsys.readouterr()
    assert captured.out == "ok\n"
    assert "2 steps" in captured.err
    code, document, _ = call(capsys, "check", job, "--set", "training.images_per_step=100")
    assert (code, document["ok"], document["images"]) == (DONE, True, 24)
    assert "each step holds 24" in document["warnings"][0]


def test_every_mistake_is_a_line_and_the_exit_code_is_2(
    job: str, capsys: pytest.CaptureFixture[str]
):
    wrong = ["--set", "network.rnak=2", "--set", "training.stesp=2", "--set", "loss.name=l9"]
    assert run(["check", job, *wrong]) == MISTAKE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "network.rnak: no such option. Did you mean 'rank'?",
        "loss.name is 'l9': input should be 'l2', 'l1', 'huber' or 'smooth_l1'.",
        "training.stesp: no such option. Did you mean 'steps'?",
    ]
    code, document, _ = call(capsys, "check", job, *wrong)
    assert code == MISTAKE
    assert len(document["problems"]) == 3
    for command in (["train", "--local"], ["cache", "--local"], ["replay", "--step", "1"]):
        assert run([command[0], job, *command[1:], *wrong]) == MISTAKE
        assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_step_before_the_first_is_a_mistake(job: str, capsys: pytest.CaptureFixture[str]):
    assert run(["replay", job, "--step", "0"]) == MISTAKE
    assert "0 is not in the range x>=1" in capsys.readouterr().err
    assert run(["replay", job]) == MISTAKE
    assert "--step" in capsys.readouterr().err


def test_the_schema_is_printed_with_or_without_json(capsys: pytest.CaptureFixture[str]):
    assert run(["schema"]) == DONE
    plain = json.loads(capsys.readouterr().out)
    assert run(["schema", "--json"]) == DONE
    assert json.loads(capsys.readouterr().out) == plain == Job.model_json_schema()
