"""A flow model's step: straight paths, timesteps that are any numbers, and what comes uncast."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.base.seeds import draw_normal
from raylora.diffusion.losses import LossOptions, make_loss
from raylora.diffusion.noise import NoiseOptions, draw_noise, make_noise
from raylora.diffusion.process import Flow
from raylora.diffusion.timesteps import TimestepOptions, make_timesteps
from raylora.memory.setting import Setting
from raylora.training.fitting import Fitting
from raylora.training.step import losses_at, sample_losses
from raylora.training.validate import NOISE_SEED, Validation

NUMBERS = [11, 12, 13]
SHAPE = (4, 6, 8)


class Watched:
    """In a family's place: predicts zeros and remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Tensor, Mapping[str, Tensor]]] = []
        self.captions: list[set[str]] = []

    def predict(self, _: Any, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        self.given.append((noisy, timesteps, conditions))
        return torch.zeros_like(noisy)

    def read_text(self, captions: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.captions.append(set(captions))
        return {name: tensor.bfloat16() for name, tensor in captions.items()}


def parts_of(watched: Watched, dtype: torch.dtype = torch.float32, **words: Any) -> Any:
    options = TimestepOptions.model_validate(words).with_usual("logit_normal", "resolution")
    return SimpleNamespace(
        adapter=SimpleNamespace(values=nn.Parameter(torch.zeros(1))),
        denoiser=None,
        device=torch.device("cpu"),
        dtype=dtype,
        group=SimpleNamespace(rank=0, size=1, gather=lambda row: [row]),
        loss=make_loss(LossOptions(), Flow()),
        fitting=Fitting(Setting(micro_batch=2)),
        micro_batch=2,
        mover=SimpleNamespace(stopped=lambda step: False),
        noise=make_noise(NoiseOptions()),
        predict=watched.predict,
        process=Flow(),
        read_text=watched.read_text,
        seed=5,
        timesteps=make_timesteps(options, Flow(), {"shift": 3.0}),
    )


def batch(**more: Tensor) -> dict[str, Tensor]:
    latents = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    return {"latents": torch.from_numpy(latents), "text": torch.ones(3, 5, 2), **more}


def test_the_step_shows_points_of_the_line_and_asks_for_its_slope():
    watched = Watched()
    parts, given = parts_of(watched, shift=2.0), batch()
    losses = sample_losses(parts, given, NUMBERS, 9)
    noise = draw_noise(SHAPE, seed=5, step=9, samples=NUMBERS)
    expected = parts.timesteps.draw((6, 8), seed=5, step=9, samples=NUMBERS)
    ((noisy, timesteps, _),) = watched.given
    assert timesteps.dtype == torch.float32
    assert torch.equal(timesteps, expected)
    sigma = (expected.double() / 1000).view(-1, 1, 1, 1)
    line = (1 - sigma) * given["latents"].double() + sigma * noise.double()
    assert_close(noisy.double(), line, rtol=1e-6, atol=1e-6)
    assert_close(losses, (noise - given["latents"]).square().mean((1, 2, 3)))


def test_the_shift_is_that_of_the_batchs_own_size():
    watched = Watched()
    parts = parts_of(watched, draw="uniform", shift="resolution")
    for height, width in ((6, 8), (64, 32)):
        given = {"latents": torch.zeros(3, 4, height, width)}
        sample_losses(parts, given, NUMBERS, 9)
    small, large = (timesteps for _, timesteps, _ in watched.given)
    assert (large > small).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_geometry_dropouts_and_timesteps_reach_the_prediction_in_float32(dtype: torch.dtype):
    watched = Watched()
    geometry = torch.tensor([[1023.0, 2047.0, 0.0, 511.0, 1024.0, 1536.0]] * 3)
    dropped = torch.tensor([[0.0, 1.0]] * 3)
    given = batch(geometry=geometry, dropped=dropped, weight=torch.ones(3))
    sample_losses(parts_of(watched, dtype), given, NUMBERS, 9)
    ((noisy, timesteps, conditions),) = watched.given
    assert (noisy.dtype, timesteps.dtype) == (dtype, torch.float32)
    assert torch.equal(conditions["geometry"], geometry)
    assert torch.equal(conditions["dropped"], dropped)
    assert conditions["geometry"].dtype == conditions["dropped"].dtype == torch.float32
    assert set(conditions) == {"text", "geometry", "dropped"}
    assert watched.captions == [{"text"}], "captions are what an encoder reads"


def test_measuring_takes_whole_timesteps_as_shares_of_noise():
    watched = Watched()
    parts = parts_of(watched)
    rows = [SimpleNamespace(number=number, bucket=(64, 48)) for number in NUMBERS]
    tensors = [{name: held[i].numpy() for name, held in batch().items()} for i in range(3)]
    dataset: Any = SimpleNamespace(rows=rows, fill=lambda: None)
    validation = Validation(dataset, (150, 900), measured=lambda dataset, rows: tensors)
    found = validation.measure(parts)
    assert {t for _, held, _ in watched.given for t in held.tolist()} == {150.0, 900.0}
    assert all(timesteps.dtype == torch.float32 for _, timesteps, _ in watched.given)
    for timestep in (150, 900):
        expected = []
        for number, held in zip(NUMBERS, tensors, strict=True):
            words: dict[str, Any] = {"seed": NOISE_SEED, "step": timestep, "sample": number}
            noise = draw_normal(SHAPE, purpose="validation", **words)
            expected.append(np.square(noise - held["latents"]).mean())
        assert found[f"validation/{timestep}"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_what_the_base_alone_predicts_is_told_the_same_extras():
    watched = Watched()
    parts = parts_of(watched)
    off: list[bool] = []

    class Off:
        def __enter__(self) -> None:
            off.append(True)

        def __exit__(self, *_: Any) -> None:
            pass

    parts.adapter.off = Off
    given = batch(preserve=torch.tensor([1.0, 0.0, 0.0]), geometry=torch.ones(3, 6))
    timesteps = torch.tensor([100.0, 200.5, 300.0])
    losses = losses_at(parts, given, torch.zeros(3, *SHAPE), timesteps)
    assert off == [True]
    assert float(losses[0]) == 0
    (first, again) = watched.given
    assert torch.equal(first[2]["geometry"], again[2]["geometry"])
    assert torch.equal(first[1], timesteps)
