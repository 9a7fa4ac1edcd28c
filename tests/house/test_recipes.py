"""The recipes in CONTRIBUTING.md work as they stand: one file each, and nothing else edited."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small import small_job

from raylora.adapt.lora_file import read_adapter

ROOT = Path(__file__).parents[2]
RECIPE = re.compile(
    r"^`raylora/(\w+)/(\w+\.py)`:\n\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL
)
# A plug-in folder is listed by its package's path, which may have several parts.
PROGRAM = """
import sys
from importlib import import_module
from pathlib import Path
for folder in Path(sys.argv[1]).iterdir():
    import_module(f"raylora.{folder.name}").__path__.append(str(folder))
from raylora.cli import run
from raylora.job import load_job
from raylora.local import train
train(load_job(sys.argv[2]), prove=False)
sys.exit(run(["runs", sys.argv[3], "--json"]))
"""


@pytest.mark.slow
def test_each_recipe_is_a_plug_in_once_its_file_is_there(tmp_path: Path) -> None:
    recipes = RECIPE.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert sorted(folder for folder, _, _ in recipes) == ["commands", "families", "networks"]
    for folder, name, text in recipes:
        path = tmp_path / "recipes" / folder / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    tree = small_job(str(tmp_path / "store"), training__steps=2).plain()
    tree["data"]["folder"] = str(ROOT / "jobs/quickstart/demo-data/holdout")
    tree["family"]["kind"] = "sd15_skip2"
    tree["network"] = {"kind": "gain", "rank": 4, "alpha": 6}
    (tmp_path / "job.yaml").write_text(json.dumps(tree))
    places = [str(tmp_path / name) for name in ("recipes", "job.yaml", "store")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *places], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"runs": {"ink-icon": 2}}
    file = read_adapter(tmp_path / "store/runs/ink-icon/ink-icon.safetensors")
    assert {module.alpha for module in file.modules.values()} == {6.0}
    assert all(module.rank == 4 for module in file.modules.values())
