"""`raylora data`: what is in a folder, a data set file or a job, without a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_arithmetic import icons

from raylora.base.errors import JobError
from raylora.cli import DONE, MISTAKE, run
from raylora.inventory import open_target, take_stock


def stock_of(target: Path | str, *overrides: str) -> dict[str, Any]:
    return take_stock(open_target(str(target), overrides))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = icons(
        tmp_path / "images",
        {"3_cat/a.png": (64, 64), "3_cat/b.png": (320, 160), "1_dog/c.png": (640, 512)},
    )
    (made / "1_dog/d.png").write_bytes((made / "1_dog/c.png").read_bytes())
    (made / "1_dog/e.png").write_bytes(b"no image")
    (made / "1_dog/c.txt").unlink()
    return made


def test_a_folder_is_counted_without_a_base_and_nothing_is_left_behind(
    folder: Path, tmp_path: Path
):
    before = sorted(tmp_path.rglob("*"))
    stock = stock_of(folder, "data.resolution=256", "data.bucket_reso_steps=32")
    (one,) = stock["sets"]
    assert (one["images"], one["bad"], one["showings"]) == (5, 1, 8)
    assert one["resolution"] == [256, 256]
    assert stock["images"] == 4
    assert stock["buckets"] == {"256x256": 3, "288x224": 2, "352x160": 3}
    assert stock["bad"][0]["key"] == "1_dog/e.png"
    pictures = stock["pictures"]
    assert (pictures["smallest"], pictures["largest"]) == ([64, 64], [640, 512])
    assert pictures["enlarged"] == 2
    assert pictures["enlarged_most"] == 4.0
    assert pictures["copies"] == 1
    assert 0 < pictures["cut_off_mean"] < pictures["cut_off_most"] < 0.2
    captions = stock["captions"]
    assert captions["different"] == 3
    assert captions["most_frequent"] == {"a cat": 2, "dog": 2, "0": 1, "1": 1}
    assert sorted(tmp_path.rglob("*")) == before


def test_images_without_a_caption_are_named_and_not_refused(tmp_path: Path):
    icons(tmp_path, {"a.png": (64, 64), "b.png": (64, 64)})
    (tmp_path / "b.txt").unlink()
    stock = stock_of(tmp_path)
    assert stock["uncaptioned"] == ["b.png"]
    assert stock["images"] == 1


def test_a_data_set_file_is_counted_as_its_sets(folder: Path, tmp_path: Path):
    (tmp_path / "sets.toml").write_text(
        f"""
        [general]
        enable_bucket = true
        [[datasets]]
        resolution = 256
        [[datasets.subsets]]
        image_dir = "{folder}/3_cat"
        num_repeats = 2
        [[datasets]]
        resolution = 512
        [[datasets.subsets]]
        image_dir = "{folder}/3_cat"
        """
    )
    stock = stock_of(tmp_path / "sets.toml")
    assert [(one["resolution"], one["showings"]) for one in stock["sets"]] == [
        ([256, 256], 4),
        ([512, 512], 2),
    ]


def test_mistakes_of_words_are_told_with_their_paths(folder: Path):
    with pytest.raises(JobError, match=r"data.resolutoin: no such option. Did you mean"):
        open_target(str(folder), ["data.resolutoin=3"])
    with pytest.raises(JobError, match="training"):
        open_target(str(folder), ["training.steps=3"])


def test_the_command_prints_words_or_one_document(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["data", str(folder), "--set", "data.resolution=256"]) == DONE
    told = capsys.readouterr().err
    assert "1 bad, left out" in told
    assert "1_dog/e.png: not an image" in told
    assert run(["data", str(folder), "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["images"] == 4
    assert run(["data", str(folder / "nothing")]) == MISTAKE
    assert "no image here" in capsys.readouterr().err
