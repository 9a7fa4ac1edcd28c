"""What a person sees: the arithmetic, progress in a pipe, the closing summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raylora.terminal import _bar, _show, progress_sink, show_arithmetic, show_result
from raylora.training.report import log_sink

NUMBERS = {
    "images": 173,
    "bad_images": 2,
    "images_with_repeats": 346,
    "sets": [
        {
            "place": "cats",
            "images": 100,
            "showings": 200,
            "resolution": [512, 512],
            "is_reg": False,
        },
        {
            "place": "reg",
            "images": 73,
            "showings": 146,
            "resolution": [768, 512],
            "is_reg": True,
        },
    ],
    "buckets": {"64x64": 300, "80x48": 46},
    "steps_of_one_bucket": 42,
    "sd_scripts": {
        "steps_per_epoch": 44,
        "steps_per_epoch_on_2_gpus": 22,
        "epochs_of_these_steps_on_2_gpus": 18.18,
    },
    "tokens": {"longest": 80, "image": "a.png", "read": 75, "counted": 171, "cut_off": 1},
    "cache": {
        "pictures_each": 1,
        "captions_each": 8,
        "pictures": 195,
        "captions": 1300,
        "picture_bytes": 65536,
        "caption_bytes": 236544,
        "bytes": 300 * 2**20,
    },
    "images_per_step": 8,
    "steps_per_epoch": 44,
    "steps": 400,
    "epochs": 9.09,
    "held_out_images": 24,
    "to_encode": {"images": 100, "captions": 90},
}
RESULT: dict[str, Any] = {
    "name": "cats",
    "steps": 400,
    "ended": "all steps",
    "files": {"adapter": "cats.safetensors", "curves": "curves.png"},
    "adapter_bytes": 2**20,
    "validation_first": 0.5,
    "validation_last": 0.4,
    "validation_best": 0.4,
    "best_step": 400,
}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")


def test_the_arithmetic_is_told_in_words(capsys: pytest.CaptureFixture[str]):
    show_arithmetic(NUMBERS)
    captured = capsys.readouterr()
    assert captured.out == ""
    for words in (
        "173 (2 bad, left out)",
        "346 an epoch",
        "64x64: 300, 80x48: 46",
        "44 an epoch at 8 images a step, whatever the number of workers",
        "400 steps = 9.09 epochs",
        "cats: 100 images, 200 showings at 512x512",
        "reg: 73 images, 146 showings at 768x512, regularisation",
        "42 of one bucket; 2 of what is left over of all",
        "with batch size 8: 44 steps an epoch",
        "on 2 GPUs 22, so 400 steps would be 18.18 epochs",
        "the longest has 80 tokens (a.png); 75 are read",
        "195 pictures of 64.0 KiB, 1300 captions of 231.0 KiB (up to 8 an image): 300.0 MiB",
        "24 images",
        "100 pictures, 90 captions",
    ):
        assert words in captured.err


def test_the_summary_says_what_was_made_where_and_what_next(capsys: pytest.CaptureFixture[str]):
    show_result(RESULT, "file:///store/runs/cats")
    told = capsys.readouterr().err
    assert "cats: 400 steps" in told
    assert "0.5000 -> 0.4000 (-20 %)" in told
    assert "lowest" not in told
    assert "early" not in told
    assert "/store/runs/cats/cats.safetensors (1.0 MiB)" in told
    assert "/store/runs/cats/curves.png" in told
    assert "raylora inspect /store/runs/cats/cats.safetensors" in told
    assert "raylora serve /store" in told
    assert "file://" not in told


def test_the_summary_names_the_best_where_it_is_not_the_last(capsys: pytest.CaptureFixture[str]):
    best = {
        "steps": 300,
        "ended": "early stop at step 300, best 250",
        "validation_best": 0.35,
        "best_step": 250,
        "files": {"adapter": "cats.safetensors", "best": "cats-best.safetensors"},
    }
    show_result({**RESULT, **best}, "file:///store/runs/cats")
    told = capsys.readouterr().err
    assert "cats: 300 steps, early stop at step 300, best 250" in told
    assert "0.5000 -> 0.4000 (-20 %); lowest 0.3500 at step 250" in told
    assert "/store/runs/cats/cats-best.safetensors" in told


def test_places_below_this_folder_are_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    show_result(RESULT, f"file://{tmp_path}/results/runs/cats")
    told = capsys.readouterr().err
    assert "raylora inspect results/runs/cats/cats.safetensors" in told
    assert "raylora serve results " in told
    assert str(tmp_path) not in told


def test_places_on_s3_stay_urls_and_what_was_done_before_says_so(
    capsys: pytest.CaptureFixture[str],
):
    again = {**RESULT, "validation_first": None, "already_done": True}
    show_result(again, "s3://bucket/store/runs/cats")
    told = capsys.readouterr().err
    assert "(was finished already)" in told
    assert "held-out" not in told
    assert "s3://bucket/store/runs/cats/cats.safetensors" in told
    assert "raylora serve s3://bucket/store" in told


def test_in_a_pipe_progress_is_plain_lines():
    with progress_sink() as sink:
        assert sink is log_sink


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"done": 5, "validation": 0.25}, "step     5  held-out loss 0.2500"),
        (
            {"done": 5, "validation": 0.25, "training": 0.125},
            "held-out loss 0.2500  of images trained on 0.1250",
        ),
        ({"event": "saved", "step": 5}, "saved  step 5"),
        ({"event": "early stop", "step": 5}, "early stop  step 5"),
        ({"event": "overfitting", "step": 5, "warning": "it [overfits]"}, "warning: it [overfits]"),
        ({"event": "unheard of", "step": 5}, None),
    ],
)
def test_the_bar_prints_what_happens_above_itself(
    row: dict[str, Any], words: str | None, capsys: pytest.CaptureFixture[str]
):
    progress = _bar()
    task = progress.add_task("train", total=None, said="")
    _show(progress, task, row)
    told = capsys.readouterr().err
    assert (words in told) if words else told == ""


def test_the_bar_follows_the_steps():
    progress = _bar()
    task = progress.add_task("train", total=None, said="")
    row = {
        "done": 30,
        "total": 400,
        "epoch": 1.52,
        "loss": 0.0831,
        "loss_average": 0.0845,
        "learning_rate": 9.8e-5,
        "images_per_second": 3.4,
        "eta_seconds": 250,
        "memory_bytes": 2**29,
        "peak_bytes": 2**30,
    }
    _show(progress, task, row)
    held = progress.tasks[0]
    assert (held.completed, held.total) == (30, 400)
    assert held.fields["said"] == (
        "epoch 1.5  loss 0.0831  mean 0.0845  lr 9.8e-05  3.4 img/s  ETA 4 min 10 s  "
        "memory 0.50 GiB, peak 1.00 GiB"
    )
    _show(progress, task, {**row, "total_bytes": 24 * 2**30})
    assert progress.tasks[0].fields["said"].endswith("peak 1.00 GiB of 24.00 GiB")
