"""`raylora verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import TINY_BASE, file_bytes, random_adapter

from raylora.cli import run

pytestmark = pytest.mark.slow


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "icons.safetensors"
    words = {"ss_steps": "1", "ss_base_model_version": "sd_v1"}
    path.write_bytes(file_bytes(random_adapter(), words, dtype=torch.float16))
    return path


def test_a_good_file_is_told_good(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(file), "--base", str(TINY_BASE)]) == 0
    out = capsys.readouterr().out
    assert "hashes      sshs_model_hash fits\n" in out
    assert "read the same ΔW in 9 of 9 modules" in out
    assert "prediction  diffusers with peft and merged weights differ by " in out
    assert "effect      the LoRA moves the base's prediction by " in out

    assert run(["verify", str(file), "--base", str(TINY_BASE), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["modules"] == 9
    assert found["difference"] <= found["limit"] < found["effect"]


def test_changed_weights_and_a_missing_base_are_mistakes(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(file)]) == 2
    assert run(["verify", str(file), "--base", str(file.parent)]) == 2
    assert "has no unet" in capsys.readouterr().err
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run(["verify", str(file), "--base", str(TINY_BASE)]) == 2
    assert "sshs_model_hash does not fit the weights" in capsys.readouterr().err
