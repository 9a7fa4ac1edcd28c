"""Whole predictions of the tiny base, by diffusers with peft and by merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import SHAPES, TINY_BASE, file_bytes, random_adapter, random_module, raw_bytes

from raylora.adapt import predictions
from raylora.adapt.keys import Naming
from raylora.adapt.lora_file import UP, AdapterModule
from raylora.adapt.predictions import verify_predictions
from raylora.base.errors import ExportError, WeightsError
from raylora.families import Family, get_family
from raylora.weights.base import open_base

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
    path.write_bytes(file_bytes(modules, dtype=dtype, naming=naming))
    return path


def unread(folder: Path, modules: list[AdapterModule]) -> Path:
    """A file that diffusers applies otherwise than it is meant."""
    path = folder / "adapter.safetensors"
    path.write_bytes(raw_bytes(modules))
    return path


@pytest.fixture(scope="module")
def base() -> Family:
    make, options = get_family("sd15")
    opened = open_base(str(TINY_BASE), kind="sd15")
    return make(opened, options(kind="sd15", weights=str(TINY_BASE)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_peft_and_merged_weights_predict_the_same(
    base: Family, tmp_path: Path, dtype: torch.dtype
) -> None:
    report = verify_predictions(saved(tmp_path, random_adapter(), dtype), base)
    assert report.modules == len(SHAPES)
    assert report.reader_error < 1e-14
    assert report.difference < 1e-6  # float32: 50 layers of 2^-24
    assert report.effect > 1e-3


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_files_of_both_namings_with_mixed_ranks_and_alphas_predict_the_same(
    base: Family, tmp_path: Path, naming: Naming
) -> None:
    shapes = {**SHAPES, **CONVOLUTIONS}
    modules = [
        random_module(name, shape, rank=2 + index % 3, alpha=1.0 + index % 4)
        for index, (name, shape) in enumerate(shapes.items())
    ]
    path = saved(tmp_path, modules, naming=naming)
    report = verify_predictions(path, base)
    assert report.modules == len(shapes)
    assert report.difference < 1e-6
    assert report.effect > 1e-3


def test_a_text_encoder_alone_acts(base: Family, tmp_path: Path) -> None:
    text = [module for module in random_adapter() if module.name.startswith("text_encoder.")]
    assert verify_predictions(saved(tmp_path, text), base).effect > 1e-5


def test_a_file_by_another_name_is_never_unpickled(base: Family, tmp_path: Path) -> None:
    renamed = saved(tmp_path, random_adapter()).rename(tmp_path / "adapter.bin")
    assert verify_predictions(renamed, base).modules == len(SHAPES)


def test_an_untrained_file_changes_nothing_and_is_told_so(base: Family, tmp_path: Path) -> None:
    fresh = random_adapter()
    for module in fresh:
        module.tensors[UP].zero_()
    with pytest.raises(ExportError, match=r"adapter\.safetensors changes nothing"):
        verify_predictions(saved(tmp_path, fresh), base)


def test_a_file_that_diffusers_applies_otherwise_is_told(base: Family, tmp_path: Path) -> None:
    name = next(iter(SHAPES))
    modules = [*random_adapter()[1:], random_module(name, SHAPES[name], alpha=3.0)]
    with pytest.raises(ExportError, match="diffusers would apply another alpha"):
        verify_predictions(unread(tmp_path, modules), base)


def test_weights_that_predict_otherwise_are_told(
    base: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if raylora's own reading were wrong in one module, which the readers' comparison missed.
    monkeypatch.setattr(predictions, "_compare_readers", lambda *_: 0.0)
    name = next(iter(SHAPES))
    modules = [*random_adapter()[1:], random_module(name, SHAPES[name], alpha=3.0)]
    with pytest.warns(RuntimeWarning), pytest.raises(ExportError, match="predict differently"):
        verify_predictions(unread(tmp_path, modules), base)


def test_a_lora_for_another_base_is_refused(base: Family, tmp_path: Path) -> None:
    name = next(iter(SHAPES))
    wider = saved(tmp_path, [random_module(name, (320, 320))])
    with pytest.raises(WeightsError, match=r"a weight of 320 x 320, the base's of 64 x 64"):
        verify_predictions(wider, base)
    other = saved(tmp_path, [random_module("unet.double_blocks.0.img_mlp.0", (64, 64))])
    with pytest.raises(WeightsError, match=r"is for FLUX\.1, and the base is Stable Diffusion 1"):
        verify_predictions(other, base)
