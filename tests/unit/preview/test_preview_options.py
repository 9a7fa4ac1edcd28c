"""What a `preview` section asks for, and what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from raylora.base.options import Options, explain
from raylora.diffusion.process import AnyProcess, Flow, Process
from raylora.diffusion.schedules import alphas_cumprod, rescaled_zero_terminal
from raylora.preview.options import PictureSettings, PreviewOptions, Usual

ALPHAS = alphas_cumprod({"beta_start": 1e-4, "beta_end": 0.02})
V, RESCALED = (Process("v_prediction", of) for of in (ALPHAS, rescaled_zero_terminal(ALPHAS)))
SD = Usual(30, 7.5, "ddim", 512, 512)


class Tree(Options):
    preview: PreviewOptions = PreviewOptions()


def read(**words: Any) -> PreviewOptions:
    return Tree.model_validate({"preview": words}).preview


def problems(options: PreviewOptions, process: AnyProcess) -> list[str]:
    return options.problems(SD, size_step=16, process=process)


def refused(**words: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        read(**words)
    return " ".join(explain(caught.value, Tree))


def test_each_prompt_is_the_section_with_its_own_words():
    section = {
        "negative": "blurry",
        "seed": 5,
        "width": 64,
        "height": 48,
        "steps": 8,
        "guidance": 3.5,
        "sampler": "heun",
    }
    own = {
        "negative": "red",
        "seed": 6,
        "width": 96,
        "height": 32,
        "steps": 3,
        "guidance": 2.0,
        "sampler": "euler_a",
    }
    flags = "a dog --n red --d 6 --w 96 --h 32 --s 3 --l 2 --ss euler_a"
    found = read(
        prompts=["a cat", flags, {"prompt": "a dog", **own}, {"prompt": "a --w 2", "seed": 0}],
        **section,
    ).pictures()
    assert found == (
        PictureSettings("a cat", stream=0, **section),
        PictureSettings("a dog", stream=1, **own),
        PictureSettings("a dog", stream=2, **own),
        PictureSettings("a --w 2", stream=3, **{**section, "seed": 0}),
    )


def test_a_word_that_says_none_or_zero_is_not_the_sections():
    section = {"negative": "blurry", "guidance": 3.5, "seed": 5}
    (found,) = read(
        prompts=[{"prompt": "a", "negative": "", "guidance": 0, "seed": 0, "strength": 0}],
        **section,
    ).pictures()
    assert (found.negative, found.guidance, found.seed, found.strength) == ("", 0, 0, 0)


def test_each_prompt_is_drawn_at_each_strength_unless_it_has_its_own():
    options = read(prompts=["a", "b --am 0.3", "c"], strengths=[0.5, 1])
    assert [(p.prompt, p.stream, p.strength) for p in options.pictures()] == [
        ("a", 0, 0.5),
        ("a", 0, 1.0),
        ("b", 1, 0.3),
        ("c", 2, 0.5),
        ("c", 2, 1.0),
    ]


def test_labels_tell_pictures_of_one_prompt_apart():
    options = read(prompts=["a", "a --d 3 --ss heun", "b --am 0.3"], strengths=[0.5, 1])
    labels = [picture.label for picture in options.pictures()]
    assert len(set(labels)) == len(labels)
    assert labels[0] == "a\nstrength 0.5"
    assert labels[3] == "a\nseed 3, sampler heun, strength 1"
    assert [picture.label for picture in read(prompts=["a"]).pictures()] == ["a"]


def test_prompts_of_a_file_stand_in_the_job_from_then_on(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat --w 64\n# no\na dog\n")
    options = read(prompts_file=str(file), width=96)
    file.unlink()
    again = read(**options.model_dump(mode="json"))
    assert again == options
    assert again.prompts_file is None
    assert [(p.prompt, p.width) for p in again.pictures()] == [("a cat", 64), ("a dog", 96)]


def test_sections_survive_being_written_and_read():
    options = read(prompts=["a --w 64", {"prompt": "b", "seed": 3}], strengths=[0.5])
    assert read(**options.model_dump(mode="json")) == options


@pytest.mark.parametrize(
    ("words", "steps", "epochs"),
    [({}, 250, None), ({"every_steps": 10}, 10, None), ({"every_epochs": 2}, None, 2)],
)
def test_rounds_are_250_steps_apart_where_nothing_is_said(words, steps, epochs):
    for options in (read(**words), read(**read(**words).model_dump(mode="json"))):
        assert (options.every_steps, options.every_epochs) == (steps, epochs)
    assert read(**words).at_start


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"every_steps": 5, "every_epochs": 1}, "give one of them (the other is null)"),
        ({"prompts": ["a"], "prompts_file": "b.txt"}, "preview.prompts_file and preview.prompts"),
        ({"prompts_file": "b.csv"}, "preview.prompts_file: b.csv: a file of prompts ends in"),
        ({"prompts": ["a", "b --cn 3"]}, "preview.prompts.1: --cn is the picture that a Contr"),
        ({"prompts": ["a --w 8"]}, "preview.prompts.0: width is 8: input should be greater"),
        ({"prompts": ["a --ss eular"]}, "preview.prompts.0: sampler is 'eular'"),
        ({"prompts": [{"prompt": "a", "stpes": 3}]}, "stpes: no such option. Did you mean 'steps'"),
        ({"prompts": [{"seed": 3}]}, "preview.prompts.0: prompt: missing"),
        ({"prompts": [3]}, "preview.prompts.0: 3 is no prompt: give a text, or a section"),
        ({"prompts": "one"}, "preview.prompts is 'one'"),
        ({"strengths": [1, 0.5, 1]}, "preview.strengths has 1 twice"),
        ({"strengths": []}, "preview.strengths is []"),
        ({"prompts": ["a --n b"], "guidance": 1}, "preview.prompts.0 has a negative prompt, and"),
        ({"prompts": ["a --n b --l 0.5"]}, "guidance 0.5 does not look at it"),
        ({"sampler": "k_heun"}, "preview.sampler is 'k_heun'"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_place(words: dict[str, Any], sentence: str):
    assert sentence in refused(**words)


def test_pictures_that_a_base_cannot_draw_are_told_by_their_place():
    options = read(
        prompts=["a", "b --w 40", "c --h 96 --w 32", "d --ss heun --w 8000"], width=70, height=64
    )
    assert problems(options, V) == [
        "preview.width and height 70x64: this base needs multiples of 16.",
        "preview.prompts.1 40x64: this base needs multiples of 16.",
    ]
    (told,) = problems(read(prompts=["a", "d --ss heun"]), RESCALED)
    assert told.startswith("preview.prompts.1.sampler (--ss): heun cannot start from pure noise")
    assert problems(read(width=70), RESCALED) == [], "nothing is drawn"
    (told,) = problems(read(prompts=["a"], sampler="ddim"), Flow())
    assert told == "preview.sampler: ddim is not for flow models. Choose euler or heun."


def test_what_is_null_is_the_familys_usual_wherever_it_is_looked_at():
    flux = Usual(28, 1.0, "euler", 1024, 1024, 3.5)
    (found,) = read(prompts=["a --h 512"]).with_usual(flux).pictures()
    assert (found.steps, found.guidance, found.sampler) == (28, 1.0, "euler")
    assert (found.width, found.height, found.embedded_guidance) == (1024, 512, 3.5)
    (found,) = read(prompts=["a --g 2"], steps=4, guidance=3).with_usual(flux).pictures()
    assert (found.steps, found.guidance, found.embedded_guidance) == (4, 3.0, 2.0)
    # A negative prompt is judged by the guidance that is really used.
    assert read(prompts=["a --n b"]).problems(flux, size_step=16, process=Flow()) == [
        "preview.prompts.0 has a negative prompt, and guidance 1 does not look at it. Set guidance "
        "above 1, or leave the negative prompt out."
    ]
    assert problems(read(prompts=["a --n b"]), V) == []


@pytest.mark.parametrize(
    ("words", "place", "instead"),
    [
        ({"embedded_guidance": 0}, "preview.embedded_guidance", "preview.guidance"),
        (
            {"prompts": ["a", "b --g 0"]},
            "preview.prompts.1.embedded_guidance (--g)",
            "preview.prompts.1.guidance (--l)",
        ),
    ],
)
def test_a_guidance_as_a_number_is_refused_where_the_base_is_told_none(
    words: dict[str, Any], place: str, instead: str
):
    options = read(**{"prompts": ["a"], **words})
    (told,) = problems(options, V)
    assert told.startswith(f"{place} is 0, and this base is told no guidance")
    assert f"Write {instead} for classifier-free guidance" in told
    assert options.problems(SD._replace(embedded_guidance=3.5), size_step=16, process=V) == []
