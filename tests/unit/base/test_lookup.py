"""Plug-ins by listing, and guesses at mistyped words."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylora.base.errors import OptionError
from raylora.base.lookup import did_you_mean, load_plugin, plugins


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "some_plugins"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "lora.py").write_text("WORD = 'lora'")
    (folder / "broken.py").write_text("import a_module_nobody_has")
    (folder / "notes.txt").write_text("no plug-in")
    monkeypatch.syspath_prepend(tmp_path)
    return "some_plugins"


def test_every_file_of_the_folder_is_a_plugin(package: str):
    assert plugins(package) == ["broken", "lora"]


def test_a_plugin_is_imported_by_its_word(package: str):
    assert load_plugin(package, "lora").WORD == "lora"


def test_an_unknown_word_gets_the_nearest(package: str):
    with pytest.raises(OptionError, match=r"'lorra' is not known\. Did you mean 'lora'\?"):
        load_plugin(package, "lorra")
    with pytest.raises(OptionError, match=r"'zzz' is not known\. Allowed: broken, lora\."):
        load_plugin(package, "zzz")


def test_a_plugins_own_missing_import_is_not_hidden(package: str):
    with pytest.raises(ModuleNotFoundError, match="a_module_nobody_has"):
        load_plugin(package, "broken")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("adamw8", " Did you mean 'adamw'?"),
        ("xyz", " Allowed: adamw, lion."),
        ("", " Allowed: adamw, lion."),
    ],
)
def test_a_guess_is_the_nearest_word_or_all_of_them(word: str, said: str):
    assert did_you_mean(word, ["lion", "adamw"]) == said


def test_no_words_no_guess():
    assert did_you_mean("adamw", []) == ""
