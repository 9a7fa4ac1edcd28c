"""The labelled grid: every picture in its place, whole, and labels beside it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from raylora.review.grid import PAPER, draw_grid

LONG = "a very long prompt about a cat that sits on a mat beside a dog, in the style of ink icons"


def picture(shade: int, width: int = 16, height: int = 16) -> Image.Image:
    return Image.new("RGB", (width, height), (shade, 0, 255))


def sheet(pictures: list[list[Image.Image]], rows: list[str] | None = None) -> np.ndarray:
    drawn = draw_grid(
        pictures,
        rows=rows or [f"prompt {i}" for i in range(len(pictures))],
        columns=[f"step {i}" for i in range(len(pictures[0]))],
        title="a run",
    )
    return np.asarray(drawn)


def place(pixels: np.ndarray, shade: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the picture of that shade; it must be a full rectangle."""
    ys, xs = np.nonzero((pixels == (shade, 0, 255)).all(axis=2))
    height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
    assert len(ys) == height * width, "something covers the picture"
    return int(ys.min()), int(xs.min()), int(height), int(width)


def test_prompts_go_down_and_steps_across():
    pixels = sheet(
        [[picture(10), picture(20), picture(30)], [picture(40), picture(50), picture(60)]]
    )
    places = {shade: place(pixels, shade) for shade in (10, 20, 30, 40, 50, 60)}
    tops = [places[shade][0] for shade in places]
    lefts = [places[shade][1] for shade in places]
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4] == tops[5]
    assert lefts[0] == lefts[3] < lefts[1] == lefts[4] < lefts[2] == lefts[5]
    assert {held[2:] for held in places.values()} == {(192, 192)}


@pytest.mark.parametrize(("size", "shown"), [((64, 64), 192), ((512, 512), 512), ((100, 50), 200)])
def test_small_pictures_are_enlarged_by_a_whole_number_and_large_ones_left(size, shown: int):
    _, _, height, width = place(sheet([[picture(10, *size)]]), 10)
    assert width == shown
    assert height == shown * size[1] // size[0]


def test_a_long_prompt_is_wrapped_beside_its_pictures():
    pixels = sheet([[picture(10)], [picture(20)]], rows=[LONG, "short"])
    left = place(pixels, 10)[1]
    paper = np.array([int(PAPER[i : i + 2], 16) for i in (1, 3, 5)])
    inked = (pixels[:, :left] != paper).any(axis=2)
    assert inked.any()
    assert not inked[:, left - 10 :].any(), "a label runs into a picture"


def test_one_word_longer_than_the_column_is_not_lost():
    pixels = sheet([[picture(10)]], rows=["x" * 200])
    assert place(pixels, 10)[2:] == (192, 192)
