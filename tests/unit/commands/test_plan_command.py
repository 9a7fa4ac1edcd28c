"""`raylora plan`: what fits on what, at what price, and why, as a person calls it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small import ROOT, small_job

import raylora
from raylora.cli import DONE, MISTAKE, run
from raylora.job import load_job

CARDS = (
    "RTX3060-12G,RTX3070,RTX4070,RTX4080,RTX4090,A6000,V100-16G,V100-32G,T4,A100-40G,A100-80G,H100"
)
SMALL = "sd15_8gb.yaml"


def job_file(name: str) -> str:
    return str(ROOT / "jobs" / name)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """(exit code, the JSON document, standard error)."""
    code = run([*arguments, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("sdxl_8gb.yaml", 1024), ("flux1_8gb.yaml", 512)])
def test_no_card_of_8_gb_or_more_is_refused(
    name: str, side: int, capsys: pytest.CaptureFixture[str]
):
    code, document, err = call(
        *(capsys, "plan", job_file(name), "--gpu", CARDS, "--each", "--host-gib", "32"),
        *("--set", f"data.resolution={side}"),
    )
    assert code == DONE, err
    assert document["bucket"] == [side, side]
    assert [plan["cards"] for plan in document["plans"]] == [[one] for one in CARDS.split(",")]
    for plan in document["plans"]:
        assert plan["problem"] == "", plan
        for worker in plan["workers"]:
            assert max(worker["peaks"].values()) <= worker["usable_bytes"] <= worker["total_bytes"]
            assert worker["host_bytes"] <= worker["host_usable_bytes"]


def test_cards_without_bf16_are_planned_with_fp16_when_alone(capsys: pytest.CaptureFixture[str]):
    code, document, _ = call(capsys, "plan", job_file(SMALL), "--gpu", "T4,RTX3070", "--each")
    assert code == DONE
    old, new = document["plans"]
    assert (old["precision"]["arithmetic"], new["precision"]["arithmetic"]) == ("fp16", "bf16")
    assert (old["advice"], new["advice"]) == ("set training.precision: fp16", "")


def test_in_a_fleet_a_card_without_bf16_is_a_mistake_that_is_told(
    capsys: pytest.CaptureFixture[str],
):
    code, document, _ = call(capsys, "plan", job_file(SMALL), "--gpu", "T4,RTX3070")
    assert code == MISTAKE
    assert "T4 cannot compute it" in document["error"]
    code, document, _ = call(
        *(capsys, "plan", job_file(SMALL), "--gpu", "T4,RTX3070"),
        *("--set", "training.precision=fp16"),
    )
    assert code == DONE


def test_a_fleet_has_one_precision_and_shares_every_step(capsys: pytest.CaptureFixture[str]):
    code, document, _ = call(
        *(capsys, "plan", job_file(SMALL), "--gpu", "RTX4090,2xA100-80G"),
        *("--set", "training.images_per_step=16", "--set", "training.epochs=null"),
        *("--set", "training.steps=1000"),
    )
    assert code == DONE
    (plan,) = document["plans"]
    assert plan["cards"] == ["RTX4090", "A100-80G", "A100-80G"]
    assert sum(worker["images"] for worker in plan["workers"]) == 16
    slowest = max(worker["busy_seconds"] for worker in plan["workers"])
    assert plan["seconds_per_step"] == pytest.approx(slowest)
    assert plan["steps_per_hour"] == pytest.approx(3600 / slowest)
    assert plan["eta_seconds"] == pytest.approx(1000 * slowest)
    hourly = sum(worker["dollars_per_hour"] for worker in plan["workers"])
    assert plan["dollars"] == pytest.approx(hourly * 1000 * slowest / 3600)
    assert plan["dollars_per_1000_steps"] == pytest.approx(plan["dollars"])
    for worker in plan["workers"]:
        covered = worker["micro_batch"] * worker["accumulation"]
        assert covered - worker["micro_batch"] < worker["images"] <= covered
        assert set(worker["peaks"]) == {"encode", "train", "validate", "save", "preview"}
        assert any(tried["taken"] for tried in worker["candidates"])
        assert all(tried["why"] for tried in worker["candidates"])
    assert all(word["why"] for word in plan["precisions"])


def test_the_kinds_that_a_fleet_names_are_planned_without_asking(
    capsys: pytest.CaptureFixture[str],
):
    code, document, _ = call(
        *(capsys, "plan", job_file(SMALL)),
        *("--set", "fleet.workers=[{gpu: L4, count: 2}, {gpu: A100}]"),
    )
    assert code == DONE
    assert document["plans"][0]["cards"] == ["L4", "L4", "A100-40G"]


def test_without_a_gpu_and_without_a_word_the_cards_are_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, document, _ = call(capsys, "plan", job_file(SMALL))
    assert code == MISTAKE
    assert "Say which cards: --gpu" in document["error"]


def test_a_card_that_is_not_known_is_told(capsys: pytest.CaptureFixture[str]):
    code, document, _ = call(capsys, "plan", job_file(SMALL), "--gpu", "RTX4900")
    assert code == MISTAKE
    assert "Did you mean 'RTX4090'" in document["error"]


def test_a_persons_own_prices_count(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "prices.yaml"
    file.write_text("RTX3070: 36\nRTX4080: null\n")
    code, document, _ = call(
        *(capsys, "plan", job_file(SMALL), "--gpu", "RTX3070,RTX4080", "--each"),
        *("--prices", str(file)),
    )
    assert code == DONE
    dear, unknown = (plan["workers"][0] for plan in document["plans"])
    # 36 dollars an hour are a cent a second, so 1,000 steps cost ten times a step's seconds.
    assert dear["dollars_per_1000_steps"] == pytest.approx(10 * dear["seconds_per_step"])
    assert unknown["dollars_per_1000_steps"] is None


def test_too_little_memory_says_what_to_change(capsys: pytest.CaptureFixture[str]):
    code, document, _ = call(
        *(capsys, "plan", job_file("flux1_80gb.yaml"), "--gpu", "RTX3070"),
        *("--set", "memory.base=full", "--set", "memory.streaming=0"),
    )
    assert code == MISTAKE
    assert "GiB" in document["error"]
    code, document, _ = call(
        *(capsys, "plan", job_file("flux1_80gb.yaml"), "--gpu", "RTX3070", "--each"),
        *("--set", "memory.base=full", "--set", "memory.streaming=0"),
    )
    assert code == DONE
    assert "GiB" in document["plans"][0]["problem"]


def test_people_get_one_table_with_cards_settings_and_costs(capsys: pytest.CaptureFixture[str]):
    assert run(["plan", job_file(SMALL), "--gpu", "RTX3070,RTX4090", "--each"]) == DONE
    said = capsys.readouterr().out
    for word in ("predicted, not measured", "RTX3070", "RTX4090", "resident", "tried", "peaks"):
        assert word in said
    assert "steps an hour" in said


def test_the_table_is_read_on_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("raylora.terminal._WIDE", 80)
    cards = "RTX3060-12G,RTX4090,2xA100-80G"
    job = job_file("flux1_24gb.yaml")
    assert run(["plan", job, "--gpu", cards, "--set", "training.images_per_step=32"]) == DONE
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert max(map(len, table)) <= 80
    for card in ("RTX3060-12G", "RTX4090", "A100-80G"):
        row = next(line for line in table if card in line)
        assert re.search(r"\d\.\d of \d+\.\d │ +\d x \d+ │ +\d+\.\d\d │", row), row


def test_a_price_that_is_not_known_is_told_of_the_whole_fleet(capsys: pytest.CaptureFixture[str]):
    assert (
        run(["plan", job_file(SMALL), "--gpu", "RTX3070,T4", "--set", "training.precision=fp16"])
        == DONE
    )
    assert "no price is known for T4 (see --prices)" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["", " , "])
def test_an_empty_list_of_cards_is_told(words: str, capsys: pytest.CaptureFixture[str]):
    code, document, _ = call(capsys, "plan", job_file(SMALL), "--gpu", words)
    assert code == MISTAKE
    assert document["error"].startswith("--gpu names no card.")


def test_too_little_host_memory_is_told_with_its_phase(capsys: pytest.CaptureFixture[str]):
    job = job_file("flux1_24gb.yaml")
    code, document, _ = call(capsys, "plan", job, "--gpu", "RTX3060-12G", "--host-gib", "8")
    assert code == MISTAKE
    assert "encode needs" in document["error"]
    assert "of host memory (" in document["error"]
    assert document["error"].endswith("Free host memory there, or leave this card out.")
    assert document["error"].count("no other form with states of 8 bits") == 1


def test_a_worker_that_is_left_without_an_image_is_told(capsys: pytest.CaptureFixture[str]):
    assert run(["plan", job_file(SMALL), "--gpu", "RTX3070,8xH100"]) == DONE
    said = capsys.readouterr().out
    assert "no image of a step is left for RTX3070" in said
    assert "│ no image │" in said


@pytest.mark.slow
def test_images_that_are_there_are_counted(tmp_path: Path):
    job = small_job(
        str(tmp_path / "store"),
        data__folder=str(ROOT / "jobs/quickstart/demo-data/holdout"),
        training__steps=None,
        training__epochs=2,
        training__images_per_step=4,
    )
    document = raylora.plan(job, ["RTX3070"])
    assert document["images"] == 24
    assert document["steps"] == 12
    assert document["note"] == ""


def test_images_that_are_not_there_leave_the_length_open(capsys: pytest.CaptureFixture[str]):
    job = load_job(job_file(SMALL))
    document = raylora.plan(job, "RTX3070")
    assert (document["images"], document["steps"]) == (None, None)
    assert "images/my-style" in document["note"]
    assert document["plans"][0]["eta_seconds"] is None


@pytest.mark.slow
def test_nothing_is_loaded_that_a_plan_from_the_table_does_not_need():
    """What would take seconds to import, or could fetch weights."""
    program = (
        "import json, sys\n"
        "from raylora.cli import run\n"
        f"code = run(['plan', {job_file('flux1_24gb.yaml')!r}, '--gpu', {CARDS!r}, '--each'])\n"
        "heavy = ('diffusers', 'transformers', 'peft', 'bitsandbytes', 'ray')\n"
        "print(json.dumps([code, [name for name in heavy if name in sys.modules]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [DONE, []]
