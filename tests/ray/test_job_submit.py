"""`ray job submit` to a real cluster that asks for a token, as cluster/local starts it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small import ROOT

from raylora.adapt.lora_file import read_adapter

SCRIPT = ROOT / "cluster" / "local" / "cluster.py"
SHORT = ["training.steps=4", "fleet.workers=1", "preview.prompts=[]", "validation.folder=null"]


@dataclass(frozen=True)
class Cluster:
    """A cluster of the script's.

    Attributes:
        client: environment of a shell that may use it.
        home: RAYLORA_HOME of its jobs.
    """

    client: dict[str, str]
    home: Path

    def submit(self, *, token: bool) -> subprocess.CompletedProcess[str]:
        """The documented command with a short job, from the root of the tree."""
        words = [word for one in SHORT for word in ("--set", one)]
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
        command += ["--working-dir", ".", "--", "python", "jobs/train.py", "jobs/quickstart.yaml"]
        secret = {} if token else {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}
        return subprocess.run(
            [*command, *words],
            cwd=ROOT,
            env={**self.client, **secret},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )

    def jobs(self) -> list[str]:
        """What became of each job that was submitted."""
        token = Path(self.client["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(
            f"{self.client['RAY_API_SERVER_ADDRESS']}/api/jobs/",
            headers={"Authorization": f"Bearer {token}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return [job["status"] for job in json.load(answer)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Started and stopped by the script; nothing of it is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))  # short, for Ray's sockets
    home = tmp_path_factory.mktemp("home")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean["RAYLORA_HOME"] = str(home)
    begin, end = (
        [sys.executable, str(SCRIPT), action, "--folder", str(folder)]
        for action in ("start", "stop")
    )
    try:
        said = subprocess.run(
            [*begin, "--cpus", "2"], env=clean, check=True, capture_output=True, text=True
        ).stdout
        exports = dict(
            line.removeprefix("export ").split("=", 1)
            for line in said.splitlines()
            if line.startswith("export ")
        )
        yield Cluster({**clean, **exports}, home)
    finally:
        subprocess.run(end, env=clean, check=False)
        shutil.rmtree(folder, ignore_errors=True)
    left = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True).stdout
    assert str(folder) not in left


@pytest.mark.timeout(280)
def test_a_submitted_job_trains_with_the_token_and_not_without(cluster: Cluster) -> None:
    refused = cluster.submit(token=False)
    assert refused.returncode != 0
    assert "Missing authentication token" in refused.stdout
    assert cluster.jobs() == []

    done = cluster.submit(token=True)
    assert done.returncode == 0, done.stdout
    assert cluster.jobs() == ["SUCCEEDED"]
    assert f"results go to {cluster.home}/results" in done.stdout
    adapter = read_adapter(cluster.home / "results/runs/ink-icon/ink-icon.safetensors")
    assert adapter.metadata["ss_steps"] == "4"


def test_the_token_is_its_owners_alone(cluster: Cluster) -> None:
    token = Path(cluster.client["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
