"""YAML as people mean it."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylora.base.errors import JobError
from raylora.base.yaml_file import parse_yaml, read_yaml_file


def read(folder: Path, text: str) -> dict[str, object]:
    (folder / "a.yaml").write_text(text)
    return read_yaml_file(folder / "a.yaml", wanted="a file", holds="something")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("training: {steps: 3}\ndata: {}\ntraining: {seed: 1}\n", "'training' .* lines 1 and 3"),
        ("training:\n  steps: 3\n  seed: 1\n  steps: 4\n", "'steps' .* lines 2 and 4"),
        ("a: [{b: 1, b: 2}]", "'b' .* lines 1 and 1"),
    ],
)
def test_a_word_given_twice_is_refused_with_its_lines(tmp_path: Path, text: str, line: str):
    with pytest.raises(JobError, match=rf"a\.yaml: {line}\. Take one out"):
        read(tmp_path, text)


def test_the_same_word_in_two_sections_is_no_mistake(tmp_path: Path):
    assert read(tmp_path, "a: {name: x}\nb: {name: y}") == {"a": {"name": "x"}, "b": {"name": "y"}}


def test_merged_sections_may_be_overruled(tmp_path: Path):
    text = "a: &a {steps: 1, seed: 2}\nb: {<<: *a, steps: 3}"
    assert read(tmp_path, text)["b"] == {"steps": 3, "seed": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E3", -2000.0),
        ("1.5e4", 15000.0),
        (".5e-1", 0.05),
        ("1e", "1e"),
        ("e-4", "e-4"),
        ("'1e-4'", "1e-4"),
        ("12", 12),
        ("1e5_warm", "1e5_warm"),
    ],
)
def test_powers_of_ten_are_numbers(text: str, value: object):
    found = parse_yaml(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


def test_nothing_is_constructed_but_plain_data(tmp_path: Path):
    with pytest.raises(JobError, match="is not YAML: could not determine a constructor"):
        read(tmp_path, "a: !!python/object/apply:os.getcwd []")
