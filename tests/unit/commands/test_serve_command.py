"""`raylora serve`: what is refused before Ray starts; the server itself is in tests/ray."""

from __future__ import annotations

import pytest

from raylora.base.errors import OptionError
from raylora.cli import MISTAKE, run
from raylora.commands.serve import serve_options
from raylora.serving.options import ServeOptions


def test_options_of_the_command_line():
    options = serve_options("127.0.0.1", 0, ("replicas=2", "cpus_only=true", "base=cats"))
    assert options == ServeOptions(port=0, replicas=2, cpus_only=True, base="cats")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("replica=2", "replica: no such option. Did you mean 'replicas'?"),
        ("replicas=0", "replicas is 0: input should be greater than or equal to 1"),
        ("replicas=[", "--set replicas=[: the value is not YAML"),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence(override, sentence):
    with pytest.raises(OptionError) as caught:
        serve_options("127.0.0.1", 0, (override,))
    assert sentence in str(caught.value)


def test_a_store_without_runs_is_the_persons_mistake(tmp_path, capsys):
    assert run(["serve", str(tmp_path)]) == MISTAKE
    assert "The store holds no runs" in capsys.readouterr().err
