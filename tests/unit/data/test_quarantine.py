"""Bad images: left out, listed, not fetched again, and too many of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datafolders import (
    FACTS,
    Counted,
    NumpyEncoder,
    build,
    fill_folder,
    image_bytes,
    plan_of,
    small_options,
)

from raylora.base.errors import DataError
from raylora.base.storage import open_storage


def quarantine(cache_url: str) -> dict[str, str]:
    lines = open_storage(cache_url).read("quarantine.jsonl").decode().splitlines()
    return {line["key"]: line["reason"] for line in map(json.loads, lines)}


def test_bad_files_are_left_out_listed_and_not_fetched_again(
    tmp_path: Path, cache_url: str, monkeypatch: pytest.MonkeyPatch
):
    folder = fill_folder(tmp_path / "images", 20)
    folder.write("image-0001.png", b"")
    folder.write("image-0002.png", image_bytes((96, 96), 3)[:-900])  # its header is whole
    folder.write("image-0003.txt", b"\xff\xfe\x00")
    folder.write("twin.png", folder.read("image-0002.png"))
    folder.write("twin.txt", b"twin of a truncated file")
    options = small_options(folder, max_bad=0.25)
    dataset = build(options, cache_url, NumpyEncoder())
    reasons = {one.key: one.reason for one in dataset.bad}
    assert list(reasons) == ["image-0001.png", "image-0002.png", "image-0003.png", "twin.png"]
    assert reasons["image-0001.png"] == "the file is empty"
    assert "truncated" in reasons["image-0002.png"]
    assert "not UTF-8" in reasons["image-0003.png"]
    assert quarantine(cache_url) == reasons
    assert len(dataset.rows) == 17
    counted = Counted(monkeypatch)
    assert build(options, cache_url).bad == dataset.bad
    assert counted.reads_of(folder.url) == {}

    folder.write("image-0002.png", image_bytes((96, 96), 3))
    encoder = NumpyEncoder()
    repaired = build(options, cache_url, encoder)
    assert encoder.images == 1
    assert len(repaired.rows) == 18
    assert "image-0002.png" not in quarantine(cache_url)


def test_too_many_bad_images_stop_the_run_with_reasons(tmp_path: Path, cache_url: str):
    folder = fill_folder(tmp_path / "images", 10)
    folder.write("image-0001.png", b"")
    with pytest.raises(
        DataError,
        match=r"1 of 10 images cannot be used, more than data.max_bad 0.05 allows. image-0001.png: "
        r"the file is empty. Repair or remove them, or raise data.max_bad",
    ):
        plan_of(small_options(folder), cache_url, **FACTS)
    folder.write("image-0001.png", image_bytes((96, 96), 3)[:-900])
    with pytest.raises(DataError, match=r"1 of 10 images cannot be used.*truncated"):
        build(small_options(folder), cache_url, NumpyEncoder())


@pytest.mark.parametrize("role", ["train", "held out"])
def test_two_folders_share_a_cache_and_a_quarantine(tmp_path: Path, cache_url: str, role: str):
    for name in ("train", "held out"):
        folder = fill_folder(tmp_path / name, 3)
        folder.write("bad.png", name.encode())
        folder.write("bad.txt", b"bad")
        build(small_options(folder, max_bad=0.5), cache_url, NumpyEncoder())
    lines = open_storage(cache_url).read("quarantine.jsonl").decode().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["bad.png", "bad.png"]
    assert any(role in json.loads(line)["folder"] for line in lines)
