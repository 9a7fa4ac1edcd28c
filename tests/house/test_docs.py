"""The pages tell the truth: options, commands, flags, files and links in them exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from raylora.base.lookup import load_plugin, plugins
from raylora.cli import COMMANDS
from raylora.job import job_from, load_job

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "cluster").glob("*/README.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# Where one command ends within a line of a shell.
ENDS = {"|", "||", "&&", ";", "&", ">", "2>", "#"}


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(text: str) -> list[str]:
    """Every line of a page's shell blocks, and every code span."""
    blocks = [block for kind, block in FENCE.findall(text) if kind in ("", "bash", "sh")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + CODE.findall(FENCE.sub("", text))


def commands_of(text: str) -> Iterator[list[str]]:
    """Every command shown in a page, as words."""
    for line in code_of(text):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation mark in a code span that is no command
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if command or not re.fullmatch(r"[A-Z_]+=.*|\$", word):
                command.append(word)
            if word in ENDS or word.endswith(";"):
                yield [one.removesuffix(";") for one in command if one not in ENDS]
                command = []


def anchors_of(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    titles = HEADING.findall(FENCE.sub("", text_of(page)))
    bare = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in bare}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_between_files_leads_somewhere(page: Path) -> None:
    links = LINK.findall(FENCE.sub("", text_of(page)))
    for link in (link for link in links if "://" not in link):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert not anchor or anchor in anchors_of(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_shown_exists_with_its_flags(page: Path) -> None:
    shown = [words for words in commands_of(text_of(page)) if words[:1] == ["raylora"]]
    for words in shown:
        if len(words) == 1 or words[1].startswith("-") or words[1].isupper():
            continue
        assert words[1] in plugins(COMMANDS), f"{shlex.join(words)}: no such command"
        known = options_of(words[1])
        flags = [word.partition("=")[0] for word in words[2:] if word.startswith("-")]
        assert not set(flags) - known, f"{shlex.join(words)}: known are {sorted(known)}"


@cache
def options_of(name: str) -> frozenset[str]:
    command = load_plugin(COMMANDS, name).command
    assert isinstance(command, click.Command)
    options = {word for one in command.params for word in one.opts if word.startswith("-")}
    return frozenset(options | {"--help", "-h"})


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_program_and_make_target_shown_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in code_of(text_of(page)):
        for target in re.findall(r"^make ([a-z-]+)", line):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
        for file in re.findall(r"\bpython ([\w./-]+\.py)\b", line):
            assert (ROOT / file).is_file(), f"{file}: no such program"


def test_the_page_of_options_is_the_one_made_from_the_code() -> None:
    path = ROOT / "docs" / "make_jobs_page.py"
    spec = importlib.util.spec_from_file_location("make_jobs_page", path)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert text_of(ROOT / "docs" / "jobs.md") == program.jobs_page(), (
        "Run `python docs/make_jobs_page.py` and commit docs/jobs.md."
    )


def test_every_job_in_the_repository_loads() -> None:
    for path in sorted((ROOT / "jobs").glob("*.yaml")):
        load_job(path)


def jobs_shown() -> list[Any]:
    """Whole jobs in the pages' YAML blocks; parts of jobs are not meant."""
    trees = [
        yaml.safe_load(block)
        for page in PAGES
        for kind, block in FENCE.findall(text_of(page))
        if kind == "yaml"
    ]
    return [tree for tree in trees if isinstance(tree, dict) and "family" in tree]


def test_every_job_shown_in_a_page_loads() -> None:
    shown = jobs_shown()
    assert shown
    for tree in shown:
        job_from(tree)
