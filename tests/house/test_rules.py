"""Rules of the house that a linter does not know."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import ROOT

FILES = sorted((ROOT / "raylora").rglob("*.py"))
every_file = pytest.mark.parametrize(
    "file", FILES, ids=lambda file: str(file.relative_to(ROOT / "raylora"))
)
# Torch's generators give other bits on other CPU kinds; numpy's global one belongs to nobody.
DRAWS = re.compile(
    r"torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial|Generator|manual_seed)\w*\("
    r"|\.(normal_|uniform_|bernoulli_|random_|exponential_)\(|nn\.init\.|nn\.Dropout|\bdropout\("
    r"|np\.random\.(?!Generator|Philox)|\brandom\.(random|shuffle|choice|sample|uniform|seed)\("
)
LATER = re.compile(r"\b(TO" r"DO|FIX" r"ME)\b(?!\(#?\d+\)|:? #\d+)")
OF_A_MACHINE = re.compile(r"(?<![\w.$}])/(root|work|mnt|Users|home/(?!raylora|someone)\w+)/")
CONTRACTS = {"ABC", "Protocol", "Options", "Generic", "NamedTuple"}
BINARY = {".png", ".jpg", ".safetensors", ".gz", ".woff2"}


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and path.suffix not in BINARY]


@every_file
def test_all_randomness_is_keyed(file: Path):
    if file.name == "seeds.py":
        return
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        assert not DRAWS.search(line), f"{file}:{number}: {line.strip()}"


@every_file
def test_people_are_told_by_logging_or_click_not_by_print(file: Path):
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not calls


def public_things(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """The module, and the public classes and functions a reader meets from outside."""
    yield tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node
            # A subclass may leave the word to the method that it overrides.
            first = isinstance(node, ast.ClassDef) and (not node.bases or bases(node) <= CONTRACTS)
            for inner in node.body if first else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield inner


def bases(node: ast.ClassDef) -> set[str]:
    return {ast.unparse(base).partition("[")[0] for base in node.bases}


@every_file
def test_every_public_thing_says_what_it_is(file: Path):
    for thing in public_things(ast.parse(file.read_text())):
        name = getattr(thing, "name", "module")
        assert ast.get_docstring(thing), f"{file}: {name} has no docstring"


@every_file
def test_a_file_is_named_for_what_it_holds(file: Path):
    nothing = {"utils", "helpers", "common", "misc", "manager"}
    assert not nothing & {part.removesuffix(".py") for part in file.parts}


def test_the_step_never_waits_for_the_device():
    text = (ROOT / "raylora/training/step.py").read_text()
    assert not re.search(r"\.(item|cpu|tolist|numpy)\(", text)


def test_tests_have_names_of_their_own():
    """Folders of tests are no packages, so pytest tells files apart by their names alone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_golden_folder_says_how_it_was_made():
    for folder in {path.parent for path in (ROOT / "tests/golden").rglob("*") if path.is_file()}:
        text = (folder / "HOW.md").read_text()
        for path in folder.iterdir():
            named = path.name in text or path.stem in text or path.name == "HOW.md"
            assert named or path.is_dir(), f"{folder}/HOW.md does not say where {path.name} is from"


def test_nothing_put_off_is_without_its_issue():
    for path in tracked():
        if path.suffix != ".md":
            found = LATER.search(path.read_text(errors="replace"))
            assert not found, f"{path}: {found}"


def test_no_file_names_a_place_on_somebodys_machine():
    for path in tracked():
        found = OF_A_MACHINE.search(path.read_text(errors="replace"))
        assert not found, f"{path}: {found}"
