"""Needs that were measured before: that they are still so, and what is found there."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from raylora.measure.on_meta import table_entry
from raylora.memory.footprint import Measured
from raylora.memory.need import ModelNeed, UnitNeed
from raylora.memory.table import (
    Entry,
    cached,
    configs_digest,
    entry_name,
    in_table,
    keep,
    made_of,
    table_text,
)
from raylora.memory.tracker import Amount
from raylora.weights.short_names import SHORT_NAMES

SIDES = (512, 768, 1024)
PRECISIONS = ("bf16", "fp16", "fp32")
MEASURED = Measured((Amount(1, 2, 3, 4), Amount(5, 1)), 7, (8, 9), (10, 0), (11, 12), 13)
MODEL = ModelNeed((UnitNeed("a.b", 4, 2, 3, 2),), 5)
ENTRY = Entry(
    denoiser=MODEL,
    text_encoders={"text_encoder": MODEL},
    vae=3,
    bucket=(64, 96),
    arithmetic="bf16",
    steps={"none": MEASURED, "all": MEASURED},
    predict=MEASURED,
    encode=(Amount(1, 1),),
    decode=(Amount(2, 1),),
    decode_tiled=(Amount(3, 0),),
    read_text={"text_encoder": (Amount(4, 4),)},
    adapter_numbers=(0, 10),
)


@pytest.mark.parametrize("base", SHORT_NAMES)
def test_every_usual_base_is_in_the_table_at_the_usual_sizes(base: str) -> None:
    assert made_of(base) == configs_digest(base), "run benchmarks/footprints.py"
    for side in SIDES:
        for precision in PRECISIONS:
            found = in_table(base, (side, side), precision)
            assert found is not None
            assert (found.bucket, found.arithmetic) == ((side, side), precision)
            assert found.steps.keys() == {"none", "mlp", "alternate", "all"}


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sd15", "sd21", "sdxl", "sd3-medium", "flux-dev"])
def test_the_table_says_what_is_measured_today(base: str) -> None:
    """Made by `python benchmarks/footprints.py`."""
    held = in_table(base, (512, 512), "bf16")
    found = table_entry(base, (512, 512), "bf16", ["all"])
    assert held is not None
    assert held.steps["all"] == found.steps["all"]
    for word in (
        *("denoiser", "text_encoders", "vae", "predict", "encode", "decode", "decode_tiled"),
        *("read_text", "adapter_numbers", "adapter_constants", "trains_text"),
    ):
        assert getattr(held, word) == getattr(found, word), word


def test_more_is_computed_again_in_less_memory_and_more_time() -> None:
    for base in SHORT_NAMES:
        found = in_table(base, (1024, 1024), "bf16")
        assert found is not None
        steps = found.at(16).steps
        none, some, most = (steps[kind] for kind in ("none", "alternate", "all"))
        assert none.dynamic.at(1) > some.dynamic.at(1) > most.dynamic.at(1)
        assert none.work.flops < some.work.flops < most.work.flops
        assert none.inputs_per_image == 0 < some.inputs_per_image < most.inputs_per_image


def test_an_entry_is_found_in_well_under_a_second() -> None:
    began = time.perf_counter()
    for base in ("sdxl", "flux-dev"):
        found = in_table(base, (1024, 1024), "bf16")
        assert found is not None
        found.at(16)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    ("base", "bucket", "precision"),
    [("sdxl", (1024, 768), "bf16"), ("sdxl", (1024, 1024), "fp64"), ("other", (512, 512), "bf16")],
)
def test_what_is_not_in_the_table_is_not_guessed(
    base: str, bucket: tuple[int, int], precision: str
) -> None:
    assert in_table(base, bucket, precision) is None


def test_an_entry_at_a_rank_is_its_need_there() -> None:
    need = ENTRY.at(100)
    assert need.adapter_numbers == 1000
    assert need.steps["all"].dynamic.at(10) == (1 + 300) + (2 + 400) * 10
    assert need.steps["all"].work.matmul_flops == 8 + 900
    assert need.steps["all"].inputs_per_image == 7
    assert need.predict.work.moved_bytes == 11 + 1200
    assert need.encode.at(2) == 3


def test_a_file_of_the_table_holds_what_was_measured() -> None:
    other = Entry(**{**ENTRY.__dict__, "bucket": (32, 32), "arithmetic": "fp32"})
    held: dict[str, Any] = json.loads(table_text("sdxl", [ENTRY, other]))
    for entry in (ENTRY, other):
        own = held["entries"][entry_name(entry.bucket, entry.arithmetic)]
        assert Entry.from_plain({**held["every"], **own}) == entry


def test_what_was_measured_is_remembered_for_the_same_facts(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path))
    assert cached({"rank": 4}) is None
    keep({"rank": 4}, ENTRY)
    assert cached({"rank": 4}) == ENTRY
    assert cached({"rank": 8}) is None
    [file] = (tmp_path / "footprints").iterdir()
    file.write_text(file.read_text()[:100])  # as a full disk leaves it
    assert cached({"rank": 4}) is None
