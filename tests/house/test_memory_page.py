"""docs/memory.md holds what the planner says today."""

from __future__ import annotations

import json

import pytest
from programs import ROOT, load_program

from raylora.base.lookup import plugins
from raylora.memory.options import MemoryOptions
from raylora.weights.short_names import SHORT_NAMES

PAGE = ROOT / "docs" / "memory.md"
MAKER = load_program("docs/make_memory_page.py")


@pytest.mark.slow
def test_the_page_is_what_its_program_writes():
    assert PAGE.read_text() == MAKER.memory_page(), (
        "Run `python docs/make_memory_page.py` and commit docs/memory.md."
    )


def test_every_family_is_there_at_both_sizes():
    kinds = {SHORT_NAMES[word].kind for word in MAKER.BASES}
    assert kinds == set(plugins("raylora.families"))
    text = PAGE.read_text()
    for title in MAKER.BASES.values():
        for side in MAKER.SIZES:
            assert f"### {title} at {side} px" in text


def test_every_option_of_memory_that_makes_room_is_told():
    text = PAGE.read_text()
    for name in MemoryOptions.model_fields:
        if name not in {"encode_batch", "budget_gib", "host_gib"}:
            assert f"`memory.{name}`" in text, name


def test_no_card_of_8_gb_is_refused():
    assert "does not fit" not in PAGE.read_text()


def test_seconds_that_are_not_to_be_trusted_are_left_out():
    rows = [
        row
        for row in MAKER.RESULTS.glob("gpu-*.json")
        for row in json.loads(row.read_text())["rows"]
    ]
    doubted = [row for row in rows if row.get("note") or not row.get("finite", True)]
    assert doubted
    for row in doubted:
        assert f"| {row['case']} |  |" in PAGE.read_text()


def test_figures_are_called_what_they_are():
    tables = " ".join(PAGE.read_text().partition("## The guides' ladder")[2].split())
    assert "Predicted GiB of a training step, not measured" in tables
    assert "**All of it is predicted, none of it measured.**" in tables
