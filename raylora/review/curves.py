"""The curves of a run: training and held-out loss, learning rate."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def draw_curves(rows: Sequence[Mapping[str, Any]], *, title: str) -> bytes:
    """A PNG of the run's metrics.

    Args:
        rows: as `training.report.read_metrics` gives them: steps with `loss` and `learning_rate`,
            and measurements with `validation` and `validation/<timestep>`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "validation" in row]
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    x = [row["done"] for row in steps]
    loss = [row["loss"] for row in steps]
    top.plot(x, loss, color="#b8c4d6", linewidth=0.8, label="training loss, each step")
    top.plot(x, _smooth(loss), color="#1f4e8c", linewidth=1.8, label="training loss, smoothed")
    if held_out:
        at = [row["done"] for row in held_out]
        values = [row["validation"] for row in held_out]
        top.plot(at, values, color="#c4521a", marker="o", linewidth=1.8, label="held-out loss")
        bands = sorted(
            (word for word in held_out[0] if word.startswith("validation/")),
            key=lambda word: int(word.split("/")[1]),
        )
        for word in bands:
            name = f"held-out at t = {word.split('/')[1]}"
            band = [row[word] for row in held_out]
            top.plot(at, band, color="#c4521a", alpha=0.35, linewidth=0.9, linestyle=":")
            above = {"xytext": (0, 3), "textcoords": "offset points"}
            top.annotate(name, (at[-1], band[-1]), **above, fontsize=7, color="#8a8a86", ha="right")
    top.set_ylabel("loss")
    top.set_title(title, loc="left")
    top.legend(frameon=False, fontsize=9)
    bottom.plot(x, [row["learning_rate"] for row in steps], color="#3f7d4a")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("global step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    held = io.BytesIO()
    canvas.print_png(held)
    return held.getvalue()


def _smooth(values: Sequence[float]) -> list[float]:
    """A moving average that weighs new values by a tenth, without the start's bias."""
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = 0.9 * mean + 0.1 * value
        weight = 0.9 * weight + 0.1
        smoothed.append(mean / weight)
    return smoothed
