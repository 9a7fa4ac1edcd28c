"""The curves of a run: training and held-out loss, learning rate."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

TRAINING, SMOOTH, HELD_OUT, RULER, RATE = "#b8c4d6", "#1f4e8c", "#c4521a", "#2f8f83", "#3f7d4a"


def draw_curves(rows: Sequence[Mapping[str, Any]], *, title: str) -> bytes:
    """A PNG of the run's metrics.

    Args:
        rows: as `training.report.read_metrics` gives them: steps with `loss` and `learning_rate`,
            and measurements with `validation` and `validation/<timestep>`, and perhaps the same of
            images that are trained on (`training`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row for row in rows if "loss" in row]
    measured = [row for row in rows if "validation" in row]
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    x = [row["done"] for row in steps]
    loss = [row["loss"] for row in steps]
    top.plot(x, loss, color=TRAINING, linewidth=0.8, label="training loss, each step")
    top.plot(x, _smooth(loss), color=SMOOTH, linewidth=1.8, label="training loss, smoothed")
    if measured:
        _draw_measured(top, measured)
    top.set_ylabel("loss")
    top.set_title(title, loc="left")
    top.legend(frameon=False, fontsize=9)
    _draw_rates(bottom, steps)
    bottom.set_xlabel("global step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    held = io.BytesIO()
    canvas.print_png(held)
    return held.getvalue()


def _draw_measured(axes: Any, measured: Sequence[Mapping[str, Any]]) -> None:
    """Held-out loss with its bands and its best, and that of images trained on."""
    at = [row["done"] for row in measured]
    ruled = [row for row in measured if "training" in row]
    axes.plot(
        at,
        [row["validation"] for row in measured],
        color=HELD_OUT,
        marker="o",
        markersize=4,
        linewidth=1.8,
        label="held-out loss",
    )
    _draw_bands(axes, measured, "validation", HELD_OUT)
    if ruled:
        axes.plot(
            [row["done"] for row in ruled],
            [row["training"] for row in ruled],
            color=RULER,
            marker="s",
            markersize=3,
            linewidth=1.4,
            label="images trained on, same ruler",
        )
        _draw_bands(axes, ruled, "training", RULER)
    trained = [row for row in measured if row["done"] > 0]
    if trained:
        best = min(trained, key=lambda row: row["validation"])
        axes.plot(
            [best["done"]],
            [best["validation"]],
            linestyle="none",
            marker="*",
            markersize=14,
            markerfacecolor="#f2c14e",
            markeredgecolor=HELD_OUT,
            zorder=5,
            label=f"best held-out: {best['validation']:.4f}, step {best['done']}",
        )
    axes.plot([], [], color="#8a8a86", linestyle=":", label="at one timestep t")


def _draw_bands(axes: Any, measured: Sequence[Mapping[str, Any]], name: str, color: str) -> None:
    """A light line for each timestep; beside the held-out ones stands which."""
    bands = sorted(
        (word for word in measured[0] if word.startswith(f"{name}/")),
        key=lambda word: int(word.split("/")[1]),
    )
    at = [row["done"] for row in measured]
    beside = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
    for word in bands:
        band = [row[word] for row in measured]
        axes.plot(at, band, color=color, alpha=0.5, linewidth=0.9, linestyle=":")
        if name == "validation":
            label = f"t = {word.split('/')[1]}"
            axes.annotate(label, (at[-1], band[-1]), **beside, fontsize=7, color="#8a8a86")


def _draw_rates(axes: Any, steps: Sequence[Mapping[str, Any]]) -> None:
    """The rate of each group of parameters; one line where they are all the same."""
    x = [row["done"] for row in steps]
    groups = list(steps[-1].get("rates", {})) if steps else []
    lines = {group: [row["rates"].get(group, 0.0) for row in steps] for group in groups}
    if len({tuple(line) for line in lines.values()}) > 1:
        for group, line in lines.items():
            axes.plot(x, line, linewidth=1.4, label=group)
        axes.legend(frameon=False, fontsize=7)
    else:
        axes.plot(x, [row["learning_rate"] for row in steps], color=RATE)
    axes.set_ylabel("learning rate")


def _smooth(values: Sequence[float]) -> list[float]:
    """A moving average that weighs new values by a tenth, without the start's bias."""
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = 0.9 * mean + 0.1 * value
        weight = 0.9 * weight + 0.1
        smoothed.append(mean / weight)
    return smoothed
