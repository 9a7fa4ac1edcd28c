"""Every command, found by listing: a line in the help, a page of its own, mistakes told."""

from __future__ import annotations

import json

import click
import pytest

from raylora.base.lookup import load_plugin, plugins
from raylora.cli import COMMANDS, DONE, MISTAKE, first_line, run

NAMES = plugins(COMMANDS)
every_command = pytest.mark.parametrize("name", NAMES)


@every_command
def test_its_file_begins_with_a_line_for_the_help(name: str, capsys: pytest.CaptureFixture[str]):
    line = first_line(name)
    assert line.endswith(".")
    assert len(line) <= 100
    assert run(["--help"]) == DONE
    assert name in capsys.readouterr().out


@every_command
def test_it_is_a_click_command_whose_parameters_have_texts(name: str):
    command = load_plugin(COMMANDS, name).command
    assert isinstance(command, click.Command)
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


@every_command
def test_it_has_a_page_of_help(name: str, capsys: pytest.CaptureFixture[str]):
    for word in ("--help", "-h"):
        assert run([name, word]) == DONE
        assert f"Usage: raylora {name}" in capsys.readouterr().out


@every_command
def test_a_wrong_option_is_a_mistake_with_json_too(name: str, capsys: pytest.CaptureFixture[str]):
    assert run([name, "--no-such-option"]) == MISTAKE
    assert "--no-such-option" in capsys.readouterr().err
    assert run([name, "--no-such-option", "--json"]) == MISTAKE
    document = json.loads(capsys.readouterr().out)
    assert "--no-such-option" in document["error"]
