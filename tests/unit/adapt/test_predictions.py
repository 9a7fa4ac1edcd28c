"""Whole predictions of the tiny base, by diffusers with peft and by merged weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import SHAPES, TINY_BASE, random_adapter, random_module

from raylora.adapt import predictions
from raylora.adapt.keys import Naming
from raylora.adapt.lora_file import UP, AdapterModule, write_adapter
from raylora.adapt.predictions import verify_predictions
from raylora.adapt.readable import readable
from raylora.base.errors import ExportError, WeightsError

pytestmark = pytest.mark.slow

CONVOLUTIONS = {
    "unet.down_blocks.0.downsamplers.0.conv": (32, 32, 3, 3),
    "unet.up_blocks.0.upsamplers.0.conv": (96, 96, 3, 3),
    "unet.down_blocks.1.resnets.0.conv_shortcut": (64, 32, 1, 1),
    "unet.down_blocks.1.resnets.0.time_emb_proj": (64, 128),
}
"""What LoCon has besides a residual block's own convolutions: other strides, 1x1, linear."""


def saved(
    folder: Path,
    modules: list[AdapterModule],
    dtype: torch.dtype = torch.float32,
    naming: Naming = "kohya",
) -> Path:
    path = folder / "adapter.safetensors"
    write_adapter(path, modules, {}, dtype=dtype, naming=naming)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_peft_and_merged_weights_predict_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    report = verify_predictions(saved(tmp_path, random_adapter(), dtype), TINY_BASE)
    assert report.modules == len(SHAPES)
    assert report.reader_error < 1e-14
    assert report.difference < 1e-6  # float32: 50 layers of 2^-24
    assert report.effect > 1e-3


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_files_of_both_namings_with_mixed_ranks_and_alphas_predict_the_same(
    tmp_path: Path, naming: Naming
) -> None:
    shapes = {**SHAPES, **CONVOLUTIONS}
    modules = [
        random_module(name, shape, rank=2 + index % 3, alpha=1.0 + index % 4)
        for index, (name, shape) in enumerate(shapes.items())
    ]
    path = saved(tmp_path, readable(modules, naming), naming=naming)
    report = verify_predictions(path, TINY_BASE)
    assert report.modules == len(shapes)
    assert report.difference < 1e-6
    assert report.effect > 1e-3


def test_a_text_encoder_alone_acts(tmp_path: Path) -> None:
    text = [module for module in random_adapter() if module.name.startswith("text_encoder.")]
    assert verify_predictions(saved(tmp_path, text), TINY_BASE).effect > 1e-5


def test_a_file_by_another_name_is_never_unpickled(tmp_path: Path) -> None:
    renamed = saved(tmp_path, random_adapter()).rename(tmp_path / "adapter.bin")
    assert verify_predictions(renamed, TINY_BASE).modules == len(SHAPES)


def test_an_untrained_file_changes_nothing_and_is_told_so(tmp_path: Path) -> None:
    fresh = random_adapter()
    for module in fresh:
        module.tensors[UP].zero_()
    with pytest.raises(ExportError, match=r"adapter\.safetensors changes nothing"):
        verify_predictions(saved(tmp_path, fresh), TINY_BASE)


def test_a_file_that_diffusers_applies_otherwise_is_told(tmp_path: Path) -> None:
    name = next(iter(SHAPES))
    modules = [*random_adapter()[1:], random_module(name, SHAPES[name], alpha=3.0)]
    with pytest.raises(ExportError, match="diffusers would apply another alpha"):
        verify_predictions(saved(tmp_path, modules), TINY_BASE)


def test_weights_that_predict_otherwise_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if raylora's own reading were wrong in one module, which the readers' comparison missed.
    monkeypatch.setattr(predictions, "_compare_readers", lambda *_: 0.0)
    name = next(iter(SHAPES))
    modules = [*random_adapter()[1:], random_module(name, SHAPES[name], alpha=3.0)]
    with pytest.warns(RuntimeWarning), pytest.raises(ExportError, match="predict differently"):
        verify_predictions(saved(tmp_path, modules), TINY_BASE)


def test_a_lora_for_another_base_is_refused(tmp_path: Path) -> None:
    name = next(iter(SHAPES))
    wider = saved(tmp_path, [random_module(name, (320, 320))])
    with pytest.raises(WeightsError, match=r"shape \(320, 320\), and the base has \(64, 64\)"):
        verify_predictions(wider, TINY_BASE)
    other = saved(tmp_path, [random_module("unet.double_blocks.0.img_mlp.0", (64, 64))])
    with pytest.raises(WeightsError, match="the base has no such layer"):
        verify_predictions(other, TINY_BASE)


def test_a_base_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path, random_adapter())
    with pytest.raises(WeightsError, match=r"has no model_index\.json"):
        verify_predictions(path, tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(WeightsError, match="is a FluxPipeline"):
        verify_predictions(path, tmp_path)
    index.write_text((TINY_BASE / "model_index.json").read_text())
    with pytest.raises(WeightsError, match="cannot be loaded"):
        verify_predictions(path, tmp_path)
