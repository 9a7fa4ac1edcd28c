"""Requests for pictures: what is refused, and what a null means."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raylora.base.errors import OptionError
from raylora.diffusion.process import AnyProcess, Flow, Process
from raylora.diffusion.schedules import alphas_cumprod, rescaled_zero_terminal
from raylora.preview.options import PictureSettings, PreviewOptions
from raylora.serving.options import RenderRequest, ServeOptions, picture_settings, read_request

ALPHAS = alphas_cumprod({"beta_start": 1e-4, "beta_end": 0.02})
PLAIN = Process("v_prediction", ALPHAS)
RESCALED = Process("v_prediction", rescaled_zero_terminal(ALPHAS))
PREVIEWS = PreviewOptions(
    prompts=("a dog", "a cat"),
    seed=5,
    steps=8,
    guidance=3.5,
    width=64,
    height=48,
    negative="blurry",
    sampler="euler_a",
)


def fill(
    limits: ServeOptions | None = None, *, process: AnyProcess = PLAIN, **words: Any
) -> PictureSettings:
    request = RenderRequest(prompt="a cat", **words)
    return picture_settings(
        request, PREVIEWS, limits or ServeOptions(), size_step=16, process=process
    )


def test_what_a_request_leaves_open_is_as_in_the_runs_previews():
    assert fill(stream=1) == PREVIEWS.pictures()[1]


def test_what_a_request_says_holds_also_where_it_says_nothing_or_zero():
    asked = fill(
        negative="", seed=0, steps=2, guidance=0, width=32, height=32, sampler="ddim", strength=0
    )
    assert asked == PictureSettings(
        "a cat",
        negative="",
        seed=0,
        stream=0,
        width=32,
        height=32,
        steps=2,
        guidance=0,
        sampler="ddim",
        strength=0,
    )


def test_a_prompt_of_a_request_is_taken_as_it_stands():
    request = RenderRequest(prompt="a cat --w 32")
    asked = picture_settings(request, PREVIEWS, ServeOptions(), size_step=16, process=PLAIN)
    assert (asked.prompt, asked.width) == ("a cat --w 32", 64)


def test_a_sampler_that_cannot_draw_what_the_run_trained_is_refused():
    assert fill(sampler="heun").sampler == "heun"
    with pytest.raises(OptionError, match=r"sampler: heun cannot start from pure noise, .*Choose"):
        fill(sampler="heun", process=RESCALED)
    assert fill(process=RESCALED).sampler == "euler_a"
    with pytest.raises(
        OptionError, match=r"sampler: euler_a is not for flow models\. Choose euler"
    ):
        fill(process=Flow())


def test_a_guidance_that_the_base_is_not_told_is_refused():
    with pytest.raises(OptionError, match=r"embedded_guidance is 2, and this base is told no"):
        fill(embedded_guidance=2.0)
    told = PREVIEWS.model_copy(update={"embedded_guidance": 3.5, "sampler": "euler"})
    for said, expected in ((None, 3.5), (2.0, 2.0)):
        request = RenderRequest(prompt="a cat", embedded_guidance=said)
        found = picture_settings(request, told, ServeOptions(), size_step=16, process=Flow())
        assert found.embedded_guidance == expected


def test_a_negative_prompt_that_nothing_looks_at_is_refused_but_the_runs_own_is_not():
    with pytest.raises(OptionError, match="negative: guidance 1 does not look at it"):
        fill(negative="red", guidance=1)
    assert fill(guidance=1).negative == "blurry"


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
        ({"sampler": "eular"}, "sampler is 'eular'"),
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
