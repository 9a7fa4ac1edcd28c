"""What a finished run leaves for people."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from raylora.assemble import open_store
from raylora.base.segments import SegmentWriter
from raylora.base.storage import Storage, open_storage
from raylora.job import Job
from raylora.preview.options import PreviewOptions
from raylora.preview.renderer import png_bytes
from raylora.training.checkpoint import State, write_checkpoint
from raylora.training.finish import finish_run
from raylora.training.sample import sample_key


@pytest.fixture
def here(tmp_path) -> Storage:
    storage = open_storage(str(tmp_path / "run"))
    writer = SegmentWriter(storage, "metrics", attempt=1)
    writer.add({"done": 0, "validation": 0.5, "validation/400": 0.5})
    for done in (1, 2, 3):
        writer.add({"done": done, "loss": 1.0 / done, "learning_rate": 1e-3})
    writer.add({"done": 3, "validation": 0.25, "validation/400": 0.25})
    writer.flush()
    for step in (1, 3):
        write_checkpoint(storage, State(step, {"values": torch.zeros(1)}, {}), b"lora %d" % step)
    return storage


def add_pictures(storage: Storage, step: int, count: int) -> None:
    for number in range(count):
        picture = np.full((8, 8, 3), (40 * step + 10 * number, 0, 255), np.uint8)
        storage.write(sample_key(step, number), png_bytes(picture))


def test_the_newest_checkpoints_file_gets_the_runs_name(here: Storage):
    result = finish_run(here, name="cats", preview=PreviewOptions())
    assert here.read("cats.safetensors") == b"lora 3"
    assert json.loads(here.read("result.json")) == result
    assert result == {
        "name": "cats",
        "steps": 3,
        "files": {"adapter": "cats.safetensors", "curves": "curves.png"},
        "adapter_bytes": 6,
        "validation_first": 0.5,
        "validation_last": 0.25,
    }
    assert Image.open(io.BytesIO(here.read("curves.png"))).width > 500


def test_the_grid_has_the_rounds_that_are_whole(here: Storage):
    preview = PreviewOptions(prompts=("a cat", "a dog"))
    for step, count in ((0, 2), (1, 1), (3, 2)):
        add_pictures(here, step, count)
    assert finish_run(here, name="cats", preview=preview)["files"]["samples"] == "samples.png"
    sheet = Image.open(io.BytesIO(here.read("samples.png"))).convert("RGB")
    shades = {color for _, color in sheet.getcolors(2**24) or []}
    for step, number in ((0, 0), (0, 1), (3, 0), (3, 1)):
        assert (40 * step + 10 * number, 0, 255) in shades
    assert (40, 0, 255) not in shades, "a round with a missing picture was shown"


def test_without_a_whole_round_there_is_no_grid(here: Storage):
    add_pictures(here, 1, 1)
    result = finish_run(here, name="cats", preview=PreviewOptions(prompts=("a cat", "a dog")))
    assert "samples" not in result["files"]
    assert here.entry("samples.png") is None


@pytest.mark.slow
def test_a_real_run_leaves_all_of_it(small_run: Job):
    storage = open_store(small_run)
    result = json.loads(storage.read("result.json"))
    assert set(result["files"]) == {"adapter", "curves", "samples"}
    assert all(storage.entry(file) for file in result["files"].values())
    assert result["validation_first"] is None
