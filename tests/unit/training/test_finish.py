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
        add_checkpoint(storage, step, best=(3, 0.25))
    return storage


def add_checkpoint(
    storage: Storage, step: int, *, best: tuple[int | None, float | None], keep: bool = False
) -> None:
    facts = {
        "judge": {"best": {"step": best[0], "loss": best[1]}},
        "keep": [best[0]] if keep else [],
    }
    state = State(step, {"values": torch.zeros(1)}, facts)
    write_checkpoint(storage, state, b"lora %d" % step)


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
        "ended": "all steps",
        "files": {"adapter": "cats.safetensors", "curves": "curves.png"},
        "adapter_bytes": 6,
        "validation_first": 0.5,
        "validation_last": 0.25,
        "validation_best": 0.25,
        "best_step": 3,
    }
    assert Image.open(io.BytesIO(here.read("curves.png"))).width > 500


def test_the_best_lies_beside_the_last_where_it_was_kept(here: Storage):
    add_checkpoint(here, 4, best=(1, 0.125), keep=True)
    result = finish_run(here, name="cats", preview=PreviewOptions())
    assert result["files"]["adapter"] == "cats.safetensors"
    assert result["files"]["best"] == "cats-best.safetensors"
    assert (result["best_step"], result["validation_best"]) == (1, 0.125)
    assert here.read("cats.safetensors") == b"lora 4"
    assert here.read("cats-best.safetensors") == b"lora 1"


@pytest.mark.parametrize(
    ("best", "keep"),
    [((4, 0.1), True), ((1, 0.1), False), ((None, None), False)],
    ids=["it is the last", "not asked for", "nothing measured"],
)
def test_otherwise_there_is_one_file(
    here: Storage, best: tuple[int | None, float | None], keep: bool
):
    add_checkpoint(here, 4, best=best, keep=keep)
    result = finish_run(here, name="cats", preview=PreviewOptions())
    assert "best" not in result["files"]
    assert here.entry("cats-best.safetensors") is None
    assert (result["best_step"], result["validation_best"]) == best


def test_a_run_that_ended_early_says_where(here: Storage):
    events = SegmentWriter(here, "events", attempt=1)
    events.add({"event": "early stop", "step": 3})
    events.flush()
    assert finish_run(here, name="cats", preview=PreviewOptions())["ended"] == (
        "early stop at step 3, best 3"
    )
    add_checkpoint(here, 4, best=(3, 0.25))  # it went on from there
    assert finish_run(here, name="cats", preview=PreviewOptions())["ended"] == "all steps"


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
