"""Share of signal left, against diffusers' schedulers and the definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from raylora.base.errors import WeightsError
from raylora.diffusion.schedules import alphas_cumprod

TINY = Path(__file__).parents[3] / "jobs/quickstart/tiny-sd/scheduler/scheduler_config.json"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_the_schedule_is_that_of_diffusers(kind: str, scheduler: str):
    import diffusers

    config = {"num_train_timesteps": 400, "beta_start": 1e-4, "beta_end": 0.02}
    theirs = getattr(diffusers, scheduler)(**config, beta_schedule=kind).alphas_cumprod
    ours = alphas_cumprod({**config, "beta_schedule": kind})
    assert len(ours) == 400
    # theirs is a product of 400 fp32 numbers
    assert_close(ours, theirs.double(), rtol=1e-4, atol=0)


def test_a_saved_config_of_diffusers_is_read_as_it_is():
    found = alphas_cumprod(json.loads(TINY.read_text()))
    assert found.dtype == torch.float64
    assert len(found) == 1000
    assert found[0] == 1 - 0.00085
    assert (found.diff() < 0).all()
    assert 0 < found[-1] < 0.005


def test_without_a_word_for_it_the_betas_are_linear_as_in_diffusers():
    given = {"num_train_timesteps": 3, "beta_start": 0.1, "beta_end": 0.3}
    expected = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
    assert_close(alphas_cumprod(given), expected, rtol=1e-14, atol=0)


def test_an_unknown_schedule_is_named():
    config = {"beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "squaredcos_cap_v2"}
    with pytest.raises(WeightsError, match="beta_schedule 'squaredcos_cap_v2'; raylora knows"):
        alphas_cumprod(config)
