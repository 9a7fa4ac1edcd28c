"""Who imports what: nothing heavy at the door, Ray behind its own, floors kept."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import ROOT, small_job

FILES = sorted((ROOT / "raylora").rglob("*.py"))
HEAVY = ("torch", "ray", "diffusers", "transformers", "numpy", "pyarrow", "boto3", "matplotlib")
WITHOUT_RAY = """
import sys
class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("a test hides ray", name="ray")
sys.meta_path.insert(0, NoRay())
from raylora.cli import run
from raylora.job import load_job
from raylora.local import train
train(load_job(sys.argv[1]), prove=False)
assert run(["train", sys.argv[1], "--set", "name=other"]) == 2
"""


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)


def imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(the statement, the module it imports)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node, node.module


@pytest.mark.parametrize(
    "program",
    [
        "import raylora",
        "from raylora.cli import run; assert run(['--help']) == 0",
        "from raylora.cli import run; assert run(['trian']) == 2",
    ],
)
def test_the_door_loads_nothing_heavy(program: str):
    told = f"{program}\nimport sys; sys.exit(str([m for m in {HEAVY} if m in sys.modules]))"
    assert python(told).stderr.strip().splitlines()[-1] == "[]"


def test_only_its_own_folder_imports_ray():
    found = {
        str(file.relative_to(ROOT))
        for file in FILES
        for _, module in imports(ast.parse(file.read_text()))
        if module.partition(".")[0] == "ray"
    }
    assert found
    assert all(file.startswith("raylora/on_ray/") for file in found)


def test_what_works_without_ray_enters_its_folder_within_functions_only():
    needs_ray = {"serve.py", "tune.py"}  # commands that are nothing without it
    for file in FILES:
        if "on_ray" in file.parts or file.name in needs_ray:
            continue
        for statement in ast.parse(file.read_text()).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                modules = [module for _, module in imports(statement)]
                assert not any(m.startswith("raylora.on_ray") for m in modules), file


@pytest.mark.slow
def test_a_job_trains_where_there_is_no_ray(tmp_path: Path):
    job = small_job(
        str(tmp_path / "store"),
        data__folder=str(ROOT / "jobs/quickstart/demo-data/holdout"),
        training__steps=2,
    )
    path = tmp_path / "job.json"  # JSON is YAML
    path.write_text(job.model_dump_json())
    done = python(WITHOUT_RAY, str(path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"store/runs/{job.name}/{job.name}.safetensors").is_file()
    assert "Ray is not installed. Run `pip install 'raylora[ray]'`, or train" in done.stderr


@pytest.mark.slow
def test_files_import_only_from_lower_floors():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_every_file_and_folder_has_a_floor():
    import tomllib

    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors = {
        name.strip().removeprefix("raylora.")
        for layer in contract["contracts"][0]["layers"]
        for name in layer.split("|")
    }
    here = {
        path.stem
        for path in (ROOT / "raylora").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").is_file()) and path.stem != "__init__"
    }
    assert here == floors
