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

RULED = [
    {**row, "training": 0.9 - 0.01 * row["done"], "training/400": 0.4, "training/1000": 1.4}
    for row in HELD_OUT
]
RATED = [{**row, "rates": {"denoiser": 1e-3, "text_encoder": 1e-4}} for row in STEPS]


def lines(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is drawn, by its label: lists of x and y."""
    from matplotlib.axes import Axes

    drawn: dict[str, Any] = {}
    plot = Axes.plot

    def noted(axes: Any, x: Any, y: Any, **style: Any) -> Any:
        drawn[style.get("label", f"unlabelled {len(drawn)}")] = (list(x), list(y))
        return plot(axes, x, y, **style)

    monkeypatch.setattr(Axes, "plot", noted)
    draw_curves(rows, title="a run")
    return drawn


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [STEPS, [*STEPS, *HELD_OUT], STEPS[:1], [], [*RATED, *RULED], RULED[:1]],
    ids=["steps", "both", "one", "none", "rulers and rates", "the base alone"],
)
def test_any_run_has_its_picture(rows: list[dict[str, Any]]):
    picture = Image.open(io.BytesIO(draw_curves(rows, title="a run")))
    assert picture.format == "PNG"
    assert min(picture.size) > 400


def test_the_smooth_line_has_no_bias_at_its_start():
    assert _smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert _smooth([1.0, 3.0]) == pytest.approx([1.0, (0.09 * 1 + 0.1 * 3) / 0.19])
    assert _smooth([]) == []


@pytest.mark.slow
def test_the_best_is_marked_and_is_not_the_bases(monkeypatch: pytest.MonkeyPatch):
    losses = [0.1, 0.5, 0.3, 0.4]
    rows = [{"done": 10 * i, "validation": loss} for i, loss in enumerate(losses)]
    drawn = lines([*STEPS, *rows], monkeypatch)
    assert drawn["best held-out: 0.3000, step 20"] == ([20], [0.3])
    assert drawn["held-out loss"] == ([0, 10, 20, 30], losses)


@pytest.mark.slow
def test_both_rulers_and_every_rate_are_drawn(monkeypatch: pytest.MonkeyPatch):
    drawn = lines([*RATED, *RULED], monkeypatch)
    assert drawn["images trained on, same ruler"][1] == pytest.approx([0.9, 0.86, 0.82])
    assert drawn["text_encoder"] == (list(range(1, 9)), [1e-4] * 8)
    bands = [y for name, (_, y) in drawn.items() if name.startswith("unlabelled")]
    for band in ([0.5] * 3, [1.5] * 3, [0.4] * 3, [1.4] * 3):
        assert band in bands
