"""`raylora inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import SHAPES, file_bytes, random_adapter, random_module

from raylora.adapt.lora_file import UP
from raylora.adapt.safetensors_format import pack
from raylora.base.storage import open_storage
from raylora.cli import run

WORDS = {
    "ss_base_model_version": "sd_v1",
    "modelspec.prediction_type": "v",
    "modelspec.trigger_phrase": "ink icon",
    "ss_sd_model_name": "tiny-sd",
    "ss_steps": "120",
    "ss_max_train_steps": "200",
    "ss_epoch": "3",
    "ss_total_batch_size": "4",
    "ss_num_train_images": "173",
    "ss_learning_rate": "0.002",
    "ss_training_comment": "None",
    "raylora.job": '{"name": "icons"}',
}


def inspect(
    path: Path | str, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, str, str]:
    code = run(["inspect", str(path), *more])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "icons.safetensors"
    path.write_bytes(file_bytes(random_adapter(), WORDS, dtype=torch.float16))
    return path


def test_the_table_says_what_the_file_is(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = inspect(file, capsys)
    assert (code, err) == (0, "")
    assert "file      icons.safetensors, 0.0 MiB, float16\n" in out
    assert "family    Stable Diffusion 1.x, predicts v\n" in out
    assert "base      tiny-sd\n" in out
    assert "modules   9 (3 in text encoder, 6 in unet)\n" in out
    assert "network   lora, names as kohya has them\n" in out
    assert "rank      4, alpha 2\n" in out
    assert (
        "trained   120 of 200 steps, epoch 3, 4 images a step, 173 images an epoch, "
        "learning rate 0.002\n"
    ) in out
    assert "trigger   ink icon\n" in out
    assert "comment" not in out
    assert "hash      sshs_model_hash fits the weights\n" in out
    assert "ΔW norms  median " in out
    assert "change nothing" not in out


def test_json_has_the_metadata_and_the_job_too(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = inspect(file, capsys, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["ranks"] == {"4": len(SHAPES)}
    assert found["steps"] == 120
    assert found["learning_rate"] == 0.002
    assert found["comment"] is None
    assert found["job"] == {"name": "icons"}
    assert found["metadata"].items() >= WORDS.items()
    assert found["norms"]["largest_module"].startswith("lora_")


def test_changed_weights_are_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "sshs_model_hash DOES NOT FIT the weights" in inspect(file, capsys)[1]


def test_mixed_ranks_and_idle_modules_are_told(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = random_adapter()
    modules[0] = random_module(modules[0].name, SHAPES[modules[0].name], rank=7)
    modules[1].tensors[UP].zero_()
    file.write_bytes(file_bytes(modules))
    out = inspect(file, capsys)[1]
    assert "rank      4 (8 modules), 7 (1 modules), alpha 2\n" in out
    assert "1 of 9 modules change nothing" in out
    assert "family    Stable Diffusion 1.x or Stable Diffusion 2.x by its names" in out


def test_words_that_are_not_what_they_should_be_do_no_harm(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"ss_steps": "many", "ss_learning_rate": "nan", "raylora.job": "{", "ss_epoch": "inf"}
    file.write_bytes(file_bytes(random_adapter(), words))
    code, out, _ = inspect(file, capsys, "--json")
    assert code == 0
    assert json.loads(out)["steps"] is None
    assert inspect(file, capsys)[0] == 0


@pytest.mark.slow
def test_a_file_in_storage_is_read(
    s3_url: str, tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (s3_url, f"file://{tmp_path}/store"):
        open_storage(place).write("a/icons.safetensors", file.read_bytes())
        code, out, _ = inspect(f"{place}/a/icons.safetensors", capsys)
        assert code == 0
        assert "file      icons.safetensors" in out
        code, _, err = inspect(f"{place}/a/absent.safetensors", capsys)
        assert code == 2
        assert "absent.safetensors" in err


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04" + bytes(99), pack({}, {}), b"x" * 99])
def test_what_is_no_lora_is_the_persons_mistake_in_one_sentence(
    data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(data)
    code, out, err = inspect(path, capsys)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(str(path))
    assert inspect(tmp_path / "absent", capsys)[0] == 2
