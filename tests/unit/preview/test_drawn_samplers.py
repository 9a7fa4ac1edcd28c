"""A sampler's pictures are those of diffusers' own pipeline with that scheduler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from small import ROOT

from raylora.diffusion.samplers import Sampler
from raylora.families.sd15 import Sd15, Sd15Options
from raylora.preview.options import PreviewOptions
from raylora.preview.renderer import draw_preview
from raylora.weights.base import open_base

BASE = ROOT / "jobs/quickstart/tiny-sd"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family() -> Sd15:
    base = open_base(str(BASE), kind="sd15")
    return Sd15(base, Sd15Options(weights=str(BASE)))


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(
        BASE, dtype=torch.float32, safety_checker=None
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("ddim", "DDIMScheduler"),
        ("pndm", "PNDMScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("euler_a", "EulerAncestralDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("dpm_2_a", "KDPM2AncestralDiscreteScheduler"),
        ("dpmsolver++", "DPMSolverMultistepScheduler"),
    ],
)
def test_a_samplers_picture_is_the_diffusers_pipelines(
    family: Sd15, pipeline: Any, monkeypatch: Any, sampler: Sampler, scheduler: str
):
    options = PreviewOptions(
        prompts=("ink icon, cat",),
        negative="red",
        sampler=sampler,
        width=64,
        height=48,
        steps=4,
        guidance=7.0,
    )
    (settings,) = options.pictures()
    noises: list[torch.Tensor] = []

    class Watched:
        def render(self, prompt: str, **given: Any) -> Any:
            noises.extend([given["latents"], *(given["noise"](k) for k in range(1, 9))])
            return renderer.render(prompt, **given)

    renderer = family.load_renderer(
        family.load_denoiser(dtype=torch.float32, device=CPU), dtype=torch.float32, device=CPU
    )
    ours = draw_preview(Watched(), family, settings, process=family.process)

    def next_noise(*_: Any, **__: Any) -> torch.Tensor:
        return noises.pop(0)

    made = getattr(diffusers, scheduler)
    words = {"skip_prk_steps": True} if sampler == "pndm" else {}
    pipeline.scheduler = made.from_config(pipeline.scheduler.config, **words)
    latents = noises.pop(0)
    module = __import__(made.__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", next_noise, raising=False)
    theirs = pipeline(
        "ink icon, cat",
        negative_prompt="red",
        height=48,
        width=64,
        latents=latents,
        num_inference_steps=4,
        guidance_scale=7.0,
        output_type="np",
    ).images[0]
    assert abs(ours.astype(int) - (theirs * 255).round().astype(int)).max() <= 1


@pytest.mark.slow
def test_each_kind_of_sampler_draws_a_picture_of_its_own(family: Sd15):
    names: list[Sampler] = ["ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a"]
    names += ["dpmsolver", "dpmsolver++", "dpmsingle"]
    renderer = family.load_renderer(
        family.load_denoiser(dtype=torch.float32, device=CPU), dtype=torch.float32, device=CPU
    )
    options = PreviewOptions(
        prompts=tuple(f"ink icon, cat --d 3 --ss {name}" for name in names),
        width=64,
        height=48,
        steps=5,
        guidance=7.0,
    )
    drawn = set()
    for settings in options.pictures():
        first_noise = replace(settings, stream=0)
        picture = draw_preview(renderer, family, first_noise, process=family.process)
        assert np.ptp(picture) > 20
        drawn.add(picture.tobytes())
    assert len(drawn) == len(names)
