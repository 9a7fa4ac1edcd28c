"""What is predicted on the meta device, against what real steps hold on the CPU.

The models are narrower and less deep than the usual bases, and made by the same code of the same
configs. Two witnesses: a tracker on real tensors, and torch's own profiler, which sees what its
allocator is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from raylora.families import Family, get_family
from raylora.job import Job
from raylora.measure.on_meta import (
    _batch,
    _losses_of,
    _on_meta,
    _read,
    _Shapes,
    _tokens,
    measured_entry,
)
from raylora.memory.need import Need
from raylora.memory.placed import Placed
from raylora.memory.setting import Setting
from raylora.memory.tracker import PeakTracker
from raylora.models import Adapted, load_adapted
from raylora.weights.true_configs import true_configs
from raylora.weights.weightless import WeightlessBase

CPU = torch.device("cpu")
SIDE = 256
TOTAL, DYNAMIC = 0.05, 0.10
"""How far a prediction may be off: of all bytes, and of those beyond weights and adapter."""
SHARE = 0.40
"""Least share of a step's own bytes in all of them, so that they are what is looked at."""

CLIP = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 1000}
CLIP |= {"num_attention_heads": 2, "projection_dim": 64}
T5 = {"d_model": 64, "d_ff": 64, "d_kv": 32, "num_heads": 2, "num_layers": 1, "vocab_size": 1000}
UNET = {"attention_head_dim": 2, "cross_attention_dim": 64}
VAE = {"block_out_channels": [32, 32, 32, 32]}


def smaller(name: str, **components: Mapping[str, Any]) -> WeightlessBase:
    configs = true_configs(name)
    return WeightlessBase(
        name, {c: {**held, **components.get(c, {})} for c, held in configs.items()}
    )


BASES: dict[str, tuple[WeightlessBase, dict[str, Any]]] = {
    "sd15": (
        smaller(
            "sd15",
            unet={**UNET, "block_out_channels": [64, 64, 128, 128]},
            text_encoder=CLIP,
            vae=VAE,
        ),
        {},
    ),
    "sdxl": (
        smaller(
            "sdxl",
            unet={
                "attention_head_dim": [2, 2, 4],
                "block_out_channels": [64, 64, 128],
                "transformer_layers_per_block": [1, 1, 2],
                "cross_attention_dim": 128,
                "addition_time_embed_dim": 32,
                "projection_class_embeddings_input_dim": 6 * 32 + 64,
            },
            text_encoder=CLIP,
            text_encoder_2=CLIP,
            vae=VAE,
        ),
        {},
    ),
    "sd3": (
        smaller(
            "sd3-medium",
            transformer={
                "num_layers": 4,
                "num_attention_heads": 4,
                "attention_head_dim": 64,
                "caption_projection_dim": 256,
                "joint_attention_dim": 128,
                "pooled_projection_dim": 128,
                "pos_embed_max_size": 32,
            },
            text_encoder=CLIP,
            text_encoder_2=CLIP,
            text_encoder_3={**T5, "d_model": 128},
            vae=VAE,
        ),
        {"t5_max_tokens": 77},
    ),
    "flux1": (
        smaller(
            "flux-dev",
            transformer={
                "num_layers": 2,
                "num_single_layers": 3,
                "num_attention_heads": 2,
                "attention_head_dim": 128,
                "joint_attention_dim": 64,
                "pooled_projection_dim": 64,
            },
            text_encoder=CLIP,
            text_encoder_2=T5,
            vae=VAE,
        ),
        {"t5_max_tokens": 77},
    ),
}


def small_family(kind: str, precision: str, **network: Any) -> tuple[Job, Family]:
    base, options = BASES[kind]
    job = Job.model_validate(
        {
            "name": kind,
            "family": {"kind": kind, "weights": kind, **options},
            "network": network,
            "data": {"folder": "."},
            "training": {"steps": 1, "seed": 0, "precision": precision},
        }
    )
    return job, get_family(kind)[0](base, job.family)


class Zeros(_Shapes):
    """The same base with weights that are there: zeros."""

    def weights(self, component: str) -> dict[str, Tensor]:
        shapes = super().weights(component)
        return {name: torch.zeros_like(held, device="cpu") for name, held in shapes.items()}


class Observed(NamedTuple):
    """Bytes of a real step: weights and adapter, and what it holds beyond them by two witnesses."""

    resident: int
    tracked: int
    profiled: int


def real_step(job: Job, family: Family, images: int) -> tuple[Adapted, Any]:
    shown = _on_meta(family, job)
    meta = shown.load_text_encoders(dtype=torch.float32, device=torch.device("meta"))
    captions, _ = _read(shown, meta, _tokens(shown), "cpu")
    held = _batch(job, shown, captions, (SIDE, SIDE))
    batch = {name: tensor[:images].contiguous() for name, tensor in held.items()}
    assert isinstance(shown.base, _Shapes)
    real = type(family)(Zeros(family.base, shown.base._models), job.family)
    models = load_adapted(job, real, CPU)
    return models, (real, _losses_of(job, real, models, batch, CPU))


def observe(job: Job, family: Family, images: int, setting: Setting) -> Observed:
    models, (real, losses) = real_step(job, family, images)
    placed = Placed(models.denoiser, real.units(models.denoiser), device=CPU)
    placed.apply(setting)

    def step() -> None:
        losses().backward()

    step()  # tables that are made once
    held = [*models.denoiser.parameters(), *models.denoiser.buffers()]
    held += [models.adapter.values, models.adapter.gradients]
    with torch.profiler.profile(profile_memory=True) as profile, PeakTracker() as tracker:
        tracker.add(held)
        tracker.begin()
        step()
    resident = tracker.before_bytes + placed.ring_bytes
    placed.close()
    return Observed(resident, tracker.peak_bytes - tracker.before_bytes, allocated(profile))


def allocated(profile: Any) -> int:
    """The most bytes that torch's allocator had given out beyond those before."""
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@cache
def predicted(kind: str, precision: str) -> Need:
    job, family = small_family(kind, precision)
    return measured_entry(job, family, (SIDE, SIDE), kernels="cpu").at()


def resident(need: Need, number_bytes: int) -> int:
    return need.denoiser.numbers * number_bytes + need.adapter_numbers * 8


CASES = [
    ("sd15", "none", 0.0, "fp32", 1),
    ("sd15", "all", 0.0, "fp32", 2),
    ("sdxl", "alternate", 0.0, "fp32", 2),
    ("sdxl", "mlp", 0.0, "fp32", 2),
    ("sd3", "none", 0.0, "bf16", 2),
    ("sd3", "all", 0.0, "fp32", 4),
    ("flux1", "none", 0.0, "fp32", 2),
    ("flux1", "all", 0.0, "bf16", 4),
    ("sd3", "none", 1.0, "fp32", 3),
    ("flux1", "none", 1.0, "fp32", 3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "checkpointing", "streamed", "precision", "images"), CASES)
def test_a_step_holds_what_was_predicted(
    kind: str, checkpointing: Any, streamed: float, precision: str, images: int
) -> None:
    job, family = small_family(kind, precision)
    need = predicted(kind, precision)
    setting = Setting(checkpointing=checkpointing, streamed=streamed)
    seen = observe(job, family, images, setting)
    # What is streamed is computed again, whatever the setting says of it.
    dynamic = need.steps["all" if streamed else checkpointing].dynamic.at(images)
    for witness in (seen.tracked, seen.profiled):
        assert dynamic == pytest.approx(witness, rel=DYNAMIC)
        assert witness > SHARE * (seen.resident + witness)
    if not streamed:
        held = resident(need, 2 if precision == "bf16" else 4)
        assert held + dynamic == pytest.approx(seen.resident + seen.profiled, rel=TOTAL)
