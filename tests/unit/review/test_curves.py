"""The curves of a run as a picture."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from raylora.review.curves import _smooth, draw_curves

STEPS: list[dict[str, Any]] = [
    {"done": i, "loss": 1.0 / i, "learning_rate": 1e-3} for i in range(1, 9)
]
HELD_OUT = [
    {"done": i, "validation": 1.0, "validation/400": 0.5, "validation/1000": 1.5} for i in (0, 4, 8)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [STEPS, [*STEPS, *HELD_OUT], STEPS[:1], []], ids=["steps", "both", "one", "none"]
)
def test_any_run_has_its_picture(rows: list[dict[str, Any]]):
    picture = Image.open(io.BytesIO(draw_curves(rows, title="a run")))
    assert picture.format == "PNG"
    assert min(picture.size) > 400


def test_the_smooth_line_has_no_bias_at_its_start():
    assert _smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert _smooth([1.0, 3.0]) == pytest.approx([1.0, (0.09 * 1 + 0.1 * 3) / 0.19])
    assert _smooth([]) == []
