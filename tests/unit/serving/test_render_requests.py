"""Requests for pictures: what is refused, and what a null means."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raylora.base.errors import OptionError
from raylora.preview.options import PreviewOptions
from raylora.serving.options import RenderRequest, ServeOptions, picture_options, read_request

PREVIEWS = PreviewOptions(seed=5, steps=8, guidance=3.5, width=64, height=48, negative="blurry")


def fill(limits: ServeOptions | None = None, **words: Any) -> PreviewOptions:
    request = RenderRequest(prompt="a cat", **words)
    return picture_options(request, PREVIEWS, limits or ServeOptions(), size_step=16)


def test_what_a_request_leaves_open_is_as_in_the_runs_previews():
    assert fill() == PREVIEWS


def test_what_a_request_says_holds_also_where_it_says_nothing_or_zero():
    asked = fill(negative="", seed=0, steps=2, guidance=0, width=32, height=32)
    assert asked == PreviewOptions(
        seed=0, steps=2, guidance=0, width=32, height=32, negative="", prompts=PREVIEWS.prompts
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"width": 70}, "70x48: this base needs multiples of 16 pixels"),
        ({"height": 40}, "64x40: this base needs multiples of 16 pixels"),
        ({"steps": 101}, "steps is 101; this server draws at most 100"),
        ({"width": 2048, "height": 1024}, "2048x1024 is 2,097,152 pixels; .* at most 1,048,576"),
    ],
)
def test_a_picture_beyond_the_limits_is_refused_in_one_sentence(words, sentence):
    with pytest.raises(OptionError, match=sentence):
        fill(**words)


def test_the_limits_are_the_servers_own():
    limits = ServeOptions(max_steps=200, max_pixels=2048 * 2048)
    assert fill(limits, steps=101, width=2048, height=1024).steps == 101


def test_a_runs_own_previews_do_not_pass_the_limits_either():
    with pytest.raises(OptionError, match="steps is 8; this server draws at most 4"):
        fill(ServeOptions(max_steps=4))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"prmpt": "x"}, "prmpt: no such option. Did you mean 'prompt'?"),
        ({"prompt": ""}, "prompt is ''"),
        ({"steps": 0}, "steps is 0: input should be greater than or equal to 1"),
        ({"strength": 11}, "strength is 11: input should be less than or equal to 10"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"width": 15}, "width is 15"),
    ],
)
def test_a_request_that_makes_no_sense_says_which_word(words, sentence):
    with pytest.raises(OptionError) as caught:
        read_request(json.dumps({"prompt": "a cat", **words}).encode())
    assert sentence in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"a cat"', b"null", b"[" * 10_000, b"\xff"])
def test_a_body_that_is_no_object_is_refused_with_an_example(body):
    with pytest.raises(OptionError, match="must be one JSON object"):
        read_request(body)
