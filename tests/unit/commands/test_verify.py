"""`raylora verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import TINY_BASE, file_bytes, random_adapter
from safetensors.torch import save

from raylora.adapt.lora_file import read_adapter
from raylora.adapt.recognise import families_of
from raylora.base.errors import OptionError
from raylora.cli import run
from raylora.commands.verify import family_of

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


@pytest.mark.parametrize("version", ["sd3-medium", "sd3-5-large"])
def test_a_file_whose_names_tell_sd3_and_flux_not_apart_is_told_by_its_header(version: str) -> None:
    tensors = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 32),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(32, 2),
    }
    said = read_adapter(save(tensors, {"ss_base_model_version": version}))
    assert families_of(said) == {"sd3", "flux1"}
    assert family_of(Path("a.safetensors"), said) == "sd3"
    with pytest.raises(OptionError, match="may be for flux1, sd3: nothing in it tells"):
        family_of(Path("a.safetensors"), read_adapter(save(tensors)))
