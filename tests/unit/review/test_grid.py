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


def test_pictures_of_other_sizes_are_whole_and_do_not_meet():
    pixels = sheet(
        [
            [picture(10, 64, 64), picture(20, 64, 64)],
            [picture(30, 96, 48), picture(40, 48, 96)],
            [picture(50, 300, 20), picture(60, 16, 16)],
        ]
    )
    places = {shade: place(pixels, shade) for shade in (10, 20, 30, 40, 50, 60)}
    assert [places[shade][2:] for shade in places] == [
        *((192, 192), (192, 192), (96, 192), (192, 96), (20, 300), (192, 192))
    ]
    for first, second in ((10, 20), (30, 40), (50, 60)):
        assert places[first][0] == places[second][0]
        assert places[first][1] + places[first][3] < places[second][1]
    assert places[20][1] == places[40][1] == places[60][1]
    assert max(places[30][0] + 96, places[40][0] + 192) < places[50][0]


def inked_rows(pixels: np.ndarray) -> set[int]:
    left = place(pixels, 10)[1]
    paper = np.array([int(PAPER[i : i + 2], 16) for i in (1, 3, 5)])
    return set(np.nonzero((pixels[:, :left] != paper).any(axis=(1, 2)))[0].tolist())


def test_a_prompt_too_long_for_its_row_is_cut_within_it_and_what_follows_a_line_break_stays():
    tall = [[picture(10, 100, 50)], [picture(20, 100, 50)]]
    pixels = sheet(tall, rows=[" ".join([LONG] * 9), "short"])
    second = place(pixels, 20)[0]
    first_row = {y for y in inked_rows(pixels) if place(pixels, 10)[0] <= y < second}
    assert max(first_row) < second - 5, "the label runs into the next row"
    kept = sheet(tall, rows=[" ".join([LONG] * 9) + "\nstrength 0.5", "short"])
    other = sheet(tall, rows=[" ".join([LONG] * 9) + "\nstrength 0.8", "short"])
    differs = np.nonzero((kept != other).any(axis=(1, 2)))[0]
    assert len(differs), "what sets the row apart was cut off"
    assert differs.max() < second


def test_a_title_wider_than_the_pictures_ends_within_the_sheet():
    drawn = draw_grid([[picture(10)]], rows=["a"], columns=["step 0"], title="a run of " * 30)
    pixels = np.asarray(drawn)
    paper = np.array([int(PAPER[i : i + 2], 16) for i in (1, 3, 5)])
    assert (pixels[:, -15:] == paper).all()
    assert (pixels[:40] != paper).any()
