"""Whole predictions with a LoRA, reached by two roads that share no code.

One road is diffusers and peft loading the file as any user's program does; the other adds raylora's
own reading of the file to the plain weights. If both predict the same, the file says what it means.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raylora.adapt.keys import find_module, kohya_to_module, module_names
from raylora.adapt.lora_file import AdapterFile, read_adapter
from raylora.adapt.merge import merge_lora
from raylora.adapt.proof_worker import compare, read_with_diffusers
from raylora.base.errors import ExportError, WeightsError
from raylora.base.log import get_logger
from raylora.base.seeds import draw_normal

# Two roads through some 50 float32 layers, 2^-24 a rounding: 3e-7 apart on the quickstart's base.
_ROUNDING = 3e-6
_SHARE_OF_EFFECT = 0.01
_MOST = 1e-5

_LOG = get_logger("verify")
_COMPONENTS = ("unet", "text_encoder")
_PROMPTS = ("", "a photo of a cat", "a red house by the sea, painting")
_TIMESTEPS = (50, 500, 950)
_MAX_LATENT_EDGE = 32  # 256 pixels: enough to pass every layer, a quarter of the work of 512


@dataclass(frozen=True)
class PredictionReport:
    """How two readers of one file compare on a base.

    Attributes:
        modules: of the file, all found in the base.
        reader_error: largest relative difference of a module's ΔW between diffusers and raylora.
        difference: ‖prediction of diffusers and peft - of merged weights‖ / ‖the latter‖.
        limit: of `difference`: float32's rounding and a hundredth of the effect, 1e-5 at most.
        effect: ‖prediction with the LoRA - of the base‖ / ‖the base's‖.
        seconds: all of it took.
    """

    modules: int
    reader_error: float
    difference: float
    limit: float
    effect: float
    seconds: float


def verify_predictions(file_path: str | Path, base_path: str | Path) -> PredictionReport:
    """Show that a LoRA file means the same to diffusers with peft as to raylora, and that it acts.

    Args:
        file_path: a LoRA file.
        base_path: the base it is for, a folder in diffusers layout.

    Raises:
        WeightsError: file or base cannot be read, or do not belong together.
        ExportError: diffusers refuses the file or reads other weights, the predictions differ, or
            the file changes nothing.
    """
    started = time.monotonic()
    path = Path(file_path)
    adapter = read_adapter(path)
    pipeline = _load(base_path)
    components = {name: getattr(pipeline, name) for name in _COMPONENTS}
    modules = _modules_in_base(adapter, components)
    reader_error = _compare_readers(path, adapter, modules)
    # Minutes for a base of full size on a CPU, so each of the three is announced.
    _LOG.info("%d modules read alike; predicting with the base alone", len(modules))
    base = _predict(pipeline)
    _LOG.info("predicting with merged weights")
    for word, model in components.items():
        merge_lora(word, model, adapter, 1.0)
    merged = _predict(pipeline)
    del pipeline, components

    _LOG.info("predicting with diffusers and peft")
    loaded = _predict(_load_with_peft(base_path, path))
    effect = _relative(merged, base)
    report = PredictionReport(
        modules=len(modules),
        reader_error=reader_error,
        difference=_relative(loaded, merged),
        limit=min(_MOST, _ROUNDING + _SHARE_OF_EFFECT * effect),
        effect=effect,
        seconds=time.monotonic() - started,
    )
    if not report.difference <= report.limit:
        raise ExportError(
            f"{path}: diffusers with peft and the merged weights predict differently, by "
            f"{report.difference:.1e} of the prediction; rounding explains {report.limit:.0e}."
        )
    if report.effect == 0:
        raise ExportError(f"{path} changes nothing: it predicts exactly what its base predicts.")
    return report


def _load(base_path: str | Path) -> Any:
    from diffusers import StableDiffusionPipeline

    index = Path(base_path) / "model_index.json"
    if not index.is_file():
        raise WeightsError(
            f"{base_path} has no model_index.json. Name a base in diffusers layout, a folder with "
            "unet, text_encoder, vae, tokenizer and scheduler."
        )
    kind = json.loads(index.read_text()).get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise WeightsError(f"{base_path} is a {kind}; verify knows StableDiffusionPipeline so far.")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(base_path),
            # Not left to the folder: transformers would take its fp16 and diffusers fp32.
            dtype=torch.float32,
            safety_checker=None,
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        raise WeightsError(f"{base_path} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_with_peft(base_path: str | Path, path: Path) -> Any:
    pipeline = _load(base_path)
    with tempfile.TemporaryDirectory() as folder:
        # diffusers goes by the name's ending, and unpickles what does not end like this.
        copy = Path(folder) / "adapter.safetensors"
        shutil.copyfile(path, copy)
        pipeline.load_lora_weights(folder, weight_name=copy.name, local_files_only=True)
    return pipeline


def _modules_in_base(adapter: AdapterFile, components: Mapping[str, nn.Module]) -> dict[str, str]:
    """The file's name of each module -> raylora's; all must be in the base with fitting shapes."""
    known = [name for word, model in components.items() for name in module_names(word, model)]
    modules = {name: kohya_to_module(name, known) for name in adapter.modules}
    for kohya, name in modules.items():
        down, up, _ = adapter.modules[kohya].low_rank
        shape = (up.shape[0], *down.shape[1:])
        weight = find_module(components, name).weight
        assert isinstance(weight, Tensor)
        if tuple(weight.shape) != shape:
            raise WeightsError(
                f"{kohya} is for a weight of shape {shape}, and the base has "
                f"{tuple(weight.shape)} there: the LoRA was trained on another base."
            )
    return modules


def _compare_readers(path: Path, adapter: AdapterFile, modules: Mapping[str, str]) -> float:
    ours = {modules[kohya]: module.low_rank for kohya, module in adapter.modules.items()}
    reading = read_with_diffusers(path)
    found = compare(reading.modules, ours)
    if problems := [*found.problems, *reading.problems]:
        raise ExportError(f"{path}: diffusers reads it otherwise; {'; '.join(problems)}")
    return found.worst


@torch.no_grad()
def _predict(pipeline: Any) -> Tensor:
    """(B, C, H, W): the base's text encoder and UNet on fixed captions, timesteps and noise."""
    config = pipeline.unet.config
    edge = min(int(config.sample_size), _MAX_LATENT_EDGE)
    shape = (int(config.in_channels), edge, edge)
    rows = [
        draw_normal(shape, seed=0, step=0, sample=row, purpose="validation")
        for row in range(len(_PROMPTS))
    ]
    noise = torch.from_numpy(np.stack(rows))
    tokens = pipeline.tokenizer(
        list(_PROMPTS),
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    text = pipeline.text_encoder(tokens)[0]
    # One row at a time needs a third of the memory on a machine without a GPU.
    inputs = zip(noise[:, None], _TIMESTEPS, text[:, None], strict=True)
    return torch.cat([pipeline.unet(n, t, encoder_hidden_states=c).sample for n, t, c in inputs])


def _relative(prediction: Tensor, reference: Tensor) -> float:
    distance = (prediction.double() - reference.double()).norm()
    return float(distance / reference.double().norm())
