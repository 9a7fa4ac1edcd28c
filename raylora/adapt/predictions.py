"""Whole predictions with a LoRA, reached by two roads that share no code.

One road adds raylora's own reading of the file to the plain weights, by the formulas of `kinds`.
The other is diffusers and peft loading the file as any user's program does; for files that
diffusers has no reader for, it is the adapter in the layers' forward passes, as in training. If
both predict the same, the file says what it means.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from raylora.adapt.attach import Attachment
from raylora.adapt.deltas import delta_distance, delta_norm
from raylora.adapt.diffusers_reader import (
    diffusers_reads,
    is_padded,
    leaves_out,
    read_with_diffusers,
)
from raylora.adapt.from_file import adapter_on
from raylora.adapt.lora_file import AdapterFile, read_adapter
from raylora.adapt.merge import Fitted, fitted, merge_lora
from raylora.adapt.onto import Names, all_sites, names_of
from raylora.base.errors import ExportError
from raylora.base.log import get_logger
from raylora.base.lookup import some_of
from raylora.base.seeds import draw_normal
from raylora.base.site import Site
from raylora.diffusion.process import Flow
from raylora.families import Family

# Two roads through some 50 float32 layers, 2^-24 a rounding: 3e-7 apart on the quickstart's base.
_ROUNDING = 3e-6
_SHARE_OF_EFFECT = 0.01
_MOST = 1e-5
_READER_ROUNDING = 1e-6  # of halves that diffusers scales in the file's dtype, float32 at least
_NAMED = 3

_LOG = get_logger("verify")
_PROMPTS = ("", "a photo of a cat", "a red house by the sea, painting")
_TIMESTEPS = (50, 500, 950)
_MAX_LATENT_EDGE = 32  # 256 pixels: enough to pass every layer, a quarter of the work of 512


@dataclass(frozen=True)
class PredictionReport:
    """How two readers of one file compare on a base.

    Attributes:
        modules: of the file, by the base's layers; all found.
        reader: which road the merged weights are compared with.
        reader_error: largest relative difference of a module's ΔW between diffusers and raylora;
            0 where diffusers is not the reader.
        difference: ‖prediction by the reader - of merged weights‖ / ‖the latter‖.
        limit: of `difference`: float32's rounding and a hundredth of the effect, 1e-5 at most.
        effect: ‖prediction with the LoRA - of the base‖ / ‖the base's‖.
        seconds: all of it took.
    """

    modules: int
    reader: Literal["diffusers", "raylora"]
    reader_error: float
    difference: float
    limit: float
    effect: float
    seconds: float


def verify_predictions(file_path: str | Path, family: Family) -> PredictionReport:
    """Show that a LoRA file means the same by two roads, and that it acts.

    Args:
        file_path: a LoRA file.
        family: with the base it is for.

    Raises:
        WeightsError: file or base cannot be read, or do not belong together.
        ExportError: diffusers refuses the file or reads other weights, the predictions differ, or
            the file changes nothing.
    """
    started = time.monotonic()
    path = Path(file_path)
    file, names = read_adapter(path), names_of(family)
    sites = all_sites(family)
    modules = fitted(file, sites, names)
    by_diffusers = _all_read(file, names)
    reader_error = _compare_readers(path, file, modules, names) if by_diffusers else 0.0
    pipeline = _load(family)
    # Minutes for a base of full size on a CPU, so each of the three is announced.
    _LOG.info("%d modules read; predicting with the base alone", len(modules))
    base = _predict(pipeline, family)
    _LOG.info("predicting with merged weights")
    for component in (family.component, *family.text_components):
        model = getattr(pipeline, component)
        if model is not None:
            merge_lora(component, model, modules, 1.0)
    merged = _predict(pipeline, family)
    del pipeline

    if by_diffusers:
        _LOG.info("predicting with diffusers and peft")
        loaded = _predict(_load_with_peft(family, path, file, names), family)
    else:
        _LOG.info("predicting with the adapter in the forward passes")
        loaded = _predict(_attached(family, path, names, sites), family)
    effect = _relative(merged, base)
    report = PredictionReport(
        modules=len(modules),
        reader="diffusers" if by_diffusers else "raylora",
        reader_error=reader_error,
        difference=_relative(loaded, merged),
        limit=min(_MOST, _ROUNDING + _SHARE_OF_EFFECT * effect),
        effect=effect,
        seconds=time.monotonic() - started,
    )
    if not report.difference <= report.limit:
        other = "diffusers with peft" if by_diffusers else "the adapter"
        raise ExportError(
            f"{path}: {other} and the merged weights predict differently, by "
            f"{report.difference:.1e} of the prediction; rounding explains {report.limit:.0e}."
        )
    if report.effect == 0:
        raise ExportError(f"{path} changes nothing: it predicts exactly what its base predicts.")
    return report


def _all_read(file: AdapterFile, names: Names) -> bool:
    """Whether `load_lora_weights` applies the whole file."""
    if not diffusers_reads(file, names.kind):
        return False
    # diffusers loads no LoRA into T5, whatever its reader reads.
    t5 = any(".encoder.block." in name or "_encoder_block_" in name for name in file.modules)
    return not t5 and not any(leaves_out(name, names.kind) for name in file.modules)


def _load(family: Family) -> Any:
    pipeline = family.load_pipeline(dtype=torch.float32, device=torch.device("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_with_peft(family: Family, path: Path, file: AdapterFile, names: Names) -> Any:
    pipeline = _load(family)
    if is_padded(file, names):
        # diffusers cuts joined layers as wide as FLUX' are; here they are cut before.
        reading = read_with_diffusers(path, names, file)
        state = {
            f"{name}.lora_{half}.weight": tensor.float()
            for name, (down, up, _) in reading.modules.items()
            for half, tensor in (("A", down), ("B", up))
        }
        pipeline.load_lora_weights(state)
        return pipeline
    with tempfile.TemporaryDirectory() as folder:
        # diffusers goes by the name's ending, and unpickles what does not end like this.
        copy = Path(folder) / "adapter.safetensors"
        shutil.copyfile(path, copy)
        pipeline.load_lora_weights(folder, weight_name=copy.name, local_files_only=True)
    return pipeline


def _attached(family: Family, path: Path, names: Names, sites: list[Site]) -> Any:
    """The pipeline with the file's adapter in the layers' forward passes."""
    device = torch.device("cpu")
    adapter = adapter_on(sites, names, path.read_bytes(), dtype=torch.float32, device=device)
    pipeline = _load(family)
    for component in (family.component, *family.text_components):
        model = getattr(pipeline, component)
        if model is not None:
            Attachment(model, component, adapter)
    return pipeline


def _compare_readers(path: Path, file: AdapterFile, modules: Fitted, names: Names) -> float:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "adapter.safetensors"
        shutil.copyfile(path, copy)
        reading = read_with_diffusers(copy, names, file)
    worst, wrong = 0.0, []
    for name, (down, up, scale) in reading.modules.items():
        if name not in modules:
            if delta_norm([(down, up, scale)]):
                wrong.append(name)
            continue
        ours = modules[name].low_rank
        norm = delta_norm([ours])
        error = delta_distance((down, up, scale), ours) / norm if norm else 0.0
        worst = max(worst, error)
        if not error <= _READER_ROUNDING:
            wrong.append(name)
    wrong += [name for name in modules if name not in reading.modules]
    told = [f"ΔW differs: {some_of(wrong, _NAMED)}"] if wrong else []
    if problems := [*told, *reading.problems]:
        raise ExportError(f"{path}: diffusers reads it otherwise; {'; '.join(problems)}")
    return worst


@torch.no_grad()
def _predict(pipeline: Any, family: Family) -> Tensor:
    """(B, C, H, W): text encoders and denoiser on fixed captions, timesteps and noise."""
    denoiser = getattr(pipeline, family.component)
    encoders: Mapping[str, nn.Module] = {
        component: model
        for component in family.text_components
        if (model := getattr(pipeline, component)) is not None
    }
    step = family.size_step // family.pixels_per_latent
    edge = max(step, _MAX_LATENT_EDGE // step * step)
    shape = (family.latent_channels, edge, edge)
    flow = isinstance(family.process, Flow)
    rows = []
    for row, (prompt, timestep) in enumerate(zip(_PROMPTS, _TIMESTEPS, strict=True)):
        # One row at a time needs a third of the memory on a machine without a GPU.
        drawn = draw_normal(shape, seed=0, step=0, sample=row, purpose="validation")
        tokens = {
            word: torch.from_numpy(np.asarray(held))
            for word, held in family.tokens([prompt]).items()
        }
        conditions = family.read_tokens(encoders, tokens)
        if family.wants_geometry:
            side = edge * family.pixels_per_latent
            told = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
            conditions = {**conditions, "geometry": told}
        times = torch.tensor([timestep], dtype=torch.float32 if flow else torch.int64)
        noisy = torch.from_numpy(drawn)[None]
        rows.append(family.predict(denoiser, noisy, times, conditions))
    return torch.cat(rows)


def _relative(prediction: Tensor, reference: Tensor) -> float:
    distance = (prediction.double() - reference.double()).norm()
    return float(distance / reference.double().norm())
