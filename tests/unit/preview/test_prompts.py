"""sd-scripts' prompts: flags behind a text, and its three kinds of file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raylora.base.errors import MissingObject, OptionError
from raylora.preview.prompts import read_prompt, read_prompts_file


def test_every_flag_is_read_in_any_order_and_case():
    line = (
        "a cat, sitting --n ugly, (bad:1.2) --w 512 --h 768 --d 7 --l 7.5 --s 20 --ss euler_a "
        "--am 0.8 --g 3.5"
    )
    words = {
        "prompt": "a cat, sitting",
        "negative": "ugly, (bad:1.2)",
        "width": 512,
        "height": 768,
        "seed": 7,
        "guidance": 7.5,
        "steps": 20,
        "sampler": "euler_a",
        "strength": 0.8,
        "embedded_guidance": 3.5,
    }
    assert read_prompt(line) == words
    first, *flags = line.split(" --")
    assert read_prompt(" --".join([first, *flags[::-1]])) == words
    assert read_prompt("a cat --W 512 --N ugly") == {
        "prompt": "a cat",
        "width": 512,
        "negative": "ugly",
    }


@pytest.mark.parametrize(
    "text", ["", "a cat", "a well-known cat", "a cat -- asleep", "a--w 512", "cat --1girl"]
)
def test_a_text_without_flags_is_the_prompt(text: str):
    assert read_prompt(text) == {"prompt": text}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a --cn x.png", "--cn is the picture that a ControlNet follows"),
        ("a --ctr 0.5", "--ctr is where Lumina stops its guidance"),
        ("a --rcfg 1.0", "--rcfg is how Lumina rescales"),
        ("a --fs 3", "--fs is the shift of a flow model"),
        ("a --i x.png", "--i is a picture to edit"),
        ("a --seed 3", r"--seed is no flag\. Allowed: am, d, g, h, .* a section: {prompt: ...}"),
        ("a --w 512px", "--w is '512px': give a whole number"),
        ("a --am 0.8,0.5", "--am is '0.8,0.5': give one number"),
        ("a --n", "--n has no value: give a text"),
        ("a --w 512 --w 64", "--w is given twice"),
        ("--n ugly", r"begins with a flag \(--n ugly\). Write the prompt"),
    ],
)
def test_a_flag_that_cannot_be_meant_is_refused_with_the_reason(text: str, sentence: str):
    with pytest.raises(OptionError, match=sentence):
        read_prompt(text)


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path):
    url = written(tmp_path, "p.txt", "# notes\n\n  a cat --w 64  \n#--n\nein Bär\r\n")
    assert read_prompts_file(url) == ["a cat --w 64", "ein Bär"]


def test_a_toml_file_has_common_words_and_a_table_for_each_picture(tmp_path: Path):
    text = """
    [prompt]
    width = 64
    negative_prompt = "ugly"
    scale = 3
    [[prompt.subset]]
    prompt = "a cat --n"
    seed = 7
    [[prompt.subset]]
    prompt = "a dog"
    width = 96
    height = 32
    sample_steps = 5
    sample_sampler = "heun"
    """
    assert read_prompts_file(written(tmp_path, "p.toml", text)) == [
        {"prompt": "a cat --n", "width": 64, "negative": "ugly", "guidance": 3, "seed": 7},
        {
            "prompt": "a dog",
            "width": 96,
            "negative": "ugly",
            "guidance": 3,
            "height": 32,
            "steps": 5,
            "sampler": "heun",
        },
    ]


def test_a_json_file_has_texts_and_objects(tmp_path: Path):
    entries = [
        "a cat --w 64",
        {"prompt": "a dog", "scale": 2.5, "additional_network_multiplier": [0.5]},
        {"prompt": "a bird", "guidance_scale": 3.5},
    ]
    assert read_prompts_file(written(tmp_path, "p.json", json.dumps(entries))) == [
        "a cat --w 64",
        {"prompt": "a dog", "guidance": 2.5, "strength": 0.5},
        {"prompt": "a bird", "embedded_guidance": 3.5},
    ]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("p.yaml", "a: b", "ends in .txt, .toml or .json"),
        ("p.txt", "# nothing", "holds no prompts"),
        ("p.toml", "prompt = 3", r"needs a table \[prompt\]"),
        ("p.toml", "= 3", "is not TOML"),
        ("p.toml", '[prompt]\nsubset = ["a"]', "prompt 0 is 'a': it needs a `prompt`"),
        ("p.toml", "[other]\n[prompt]\nsubset = []", r"\[other\] is no table of prompts"),
        ("p.json", "{}", "needs a list"),
        ("p.json", "[", "is not JSON"),
        ("p.json", '[{"prompt": "a", "flow_shift": 3}]', "prompt 0: flow_shift is the shift of"),
        ("p.json", '[{"prompt": "a", "stepps": 3}]', "prompt 0: stepps is no key"),
        ("p.json", '["a", {"width": 3}]', "prompt 1 is .* it needs a `prompt`"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_by_its_name(
    tmp_path: Path, name: str, text: str, sentence: str
):
    url = written(tmp_path, name, text)
    with pytest.raises(OptionError, match=sentence) as caught:
        read_prompts_file(url)
    assert name in str(caught.value)


def test_a_file_that_is_not_there_is_told_of(tmp_path: Path):
    with pytest.raises(MissingObject, match=r"none\.txt"):
        read_prompts_file(str(tmp_path / "none.txt"))


def test_a_file_of_another_encoding_is_told_of(tmp_path: Path):
    (tmp_path / "p.txt").write_bytes("ein Bär".encode("latin-1"))
    with pytest.raises(OptionError, match="is not a text file in UTF-8"):
        read_prompts_file(str(tmp_path / "p.txt"))
