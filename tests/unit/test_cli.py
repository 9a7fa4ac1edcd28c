"""The command line's frame: finding commands, exit codes, what goes where."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raylora import cli
from raylora.base.lookup import plugins

Run = Callable[..., tuple[int, str, str]]

HEAD = '''"""{line}

More.
"""
import click
from raylora.base.errors import *
from raylora.cli_options import json_option, set_option
LOADED = print("loading {name}")

@click.command()
@set_option
@json_option
def command(overrides, as_json):
    """Help of {name}."""
'''
BODIES = {
    "works": (
        "    print('chatter')\n    return {'set': overrides, 'loss': float('nan'), 'as': as_json}"
    ),
    "jobs": "    raise JobError(['network.rank: too small.', 'data.folder: missing.'])",
    "weights": "    raise WeightsError('x.safetensors is a pickle.')",
    "export": "    raise ExportError('The file is not what was trained.')",
    "breaks": "    raise RuntimeError('a bug')",
    "stops": "    raise KeyboardInterrupt",
    "leaves": "    raise click.exceptions.Exit(3)",
    "import": "    return {}",  # a command may be called like a word of Python
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line over a folder of small commands: (exit code, stdout, stderr)."""
    folder = tmp_path / "fakecommands"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for name, body in BODIES.items():
        (folder / f"{name}.py").write_text(HEAD.format(line=f"Line of {name}.", name=name) + body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "COMMANDS", "fakecommands")
    for module in [name for name in sys.modules if name.startswith("fakecommands")]:
        monkeypatch.delitem(sys.modules, module)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_help_lists_the_files_by_their_first_line_and_imports_none(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name in BODIES:
        assert f"{name} " in out
        assert f"Line of {name}." in out
    assert "loading" not in out


def test_a_commands_own_help_imports_only_it(run: Run) -> None:
    code, out, _ = run("works", "--help")
    assert code == 0
    assert "Help of works." in out
    assert "--set" in out
    assert out.count("loading") == 1


def test_without_a_command_the_help_is_shown_once(run: Run) -> None:
    code, out, err = run()
    assert code == 2
    assert (out + err).count("Usage:") == 1
    assert "Line of works." in err


def test_an_unknown_command_is_a_usage_error_with_the_nearest_name(run: Run) -> None:
    code, out, err = run("wroks")
    assert (code, out) == (2, "")
    assert "'wroks' is no command. Did you mean 'works'?" in err


def test_an_unknown_option_is_a_usage_error(run: Run) -> None:
    code, _, err = run("works", "--jsn")
    assert code == 2
    assert "No such option '--jsn'. (Did you mean one of: '--json', '--set'?)" in err
    assert run("--bogus")[0] == 2


def test_json_alone_is_on_standard_output(run: Run) -> None:
    code, out, err = run("works", "--set", "a.b=1", "--json", "--set", "c=x=y")
    assert code == 0
    assert json.loads(out) == {"set": ["a.b=1", "c=x=y"], "loss": None, "as": True}
    assert "chatter" in err
    assert "chatter" in run("works")[1]


@pytest.mark.parametrize(
    ("name", "code", "lines"),
    [
        ("jobs", 2, ["network.rank: too small.", "data.folder: missing."]),
        ("weights", 2, ["x.safetensors is a pickle."]),
        ("export", 1, ["The file is not what was trained."]),
        ("stops", 1, ["Stopped."]),
    ],
)
def test_errors_have_an_exit_code_one_line_each_and_no_traceback(
    run: Run, name: str, code: int, lines: list[str]
) -> None:
    found, out, err = run(name)
    assert (found, out) == (code, f"loading {name}\n")
    assert [line for line in err.splitlines() if line] == lines
    found, out, err = run(name, "--json")
    assert found == code
    assert json.loads(out) == {"error": "\n".join(lines), "problems": lines}


def test_a_bug_shows_its_traceback(run: Run) -> None:
    code, _, err = run("breaks")
    assert code == 1
    assert "Traceback" in err
    assert "RuntimeError: a bug" in err
    code, out, _ = run("breaks", "--json")
    assert code == 1
    assert json.loads(out)["error"] == "RuntimeError: a bug"


def test_usage_errors_are_json_too(run: Run) -> None:
    code, out, _ = run("works", "--json", "--nothing")
    assert code == 2
    assert "--nothing" in json.loads(out)["error"]
    code, out, _ = run("works", "--json", "--set", "rank")
    assert code == 2
    assert json.loads(out)["problems"] == [
        "--set rank: no path and value. Write it like --set network.rank=8."
    ]


def test_a_commands_own_exit_code_is_kept(run: Run) -> None:
    assert run("leaves")[0] == 3


def test_version(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("raylora 0.")


@pytest.mark.parametrize("name", plugins("raylora.commands"))
def test_every_real_command_has_a_line_and_help(name: str) -> None:
    line = cli.first_line(name)
    assert 10 < len(line) < 100
    assert line.endswith(".")


def test_help_of_the_real_command_line_is_quick_and_loads_no_torch() -> None:
    script = (
        "import sys; from raylora.cli import run; code = run(['--help']); "
        "heavy = {'torch', 'ray', 'diffusers', 'numpy', 'pydantic'} & set(sys.modules); "
        "sys.exit(code or str(sorted(heavy)) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "inspect" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error_to_show() -> None:
    command = f"{sys.executable} -m raylora.cli --help | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
