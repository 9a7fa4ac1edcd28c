"""docs/families.md says of each family what the code does."""

from __future__ import annotations

import pytest
from programs import ROOT, load_program

from raylora.base.lookup import plugins


@pytest.mark.slow
def test_the_page_is_what_its_program_writes():
    page = load_program("docs/make_families_page.py").families_page()
    assert (ROOT / "docs" / "families.md").read_text() == page, (
        "Run `python docs/make_families_page.py` and commit docs/families.md."
    )


@pytest.mark.parametrize("folder", ["families", "networks"])
def test_each_plug_in_has_a_row(folder: str):
    text = (ROOT / "docs" / "families.md").read_text()
    for kind in plugins(f"raylora.{folder}"):
        assert f"| `{kind}` |" in text


def test_layers_at_true_size_are_as_many_as_sd_scripts_trains():
    text = (ROOT / "docs" / "families.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    kohya = {row[0].strip("| `"): row[6] for row in rows if len(row) == 8 and row[6].isdecimal()}
    assert kohya == {
        "sd15": "192",
        "sd21": "192",
        "sdxl": "722",
        "sd3-medium": "237",
        "sd3.5-medium": "263",
        "sd3.5-large": "377",
        "flux-dev": "304",
        "flux-schnell": "304",
    }
