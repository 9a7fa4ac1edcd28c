"""Share of signal left, against diffusers' schedulers and the definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from raylora.base.errors import WeightsError
from raylora.diffusion.schedules import alphas_cumprod, rescaled_zero_terminal

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "losses.json").read_text()
)["zero_terminal_snr"]
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


@pytest.mark.slow
def test_a_base_that_was_trained_to_pure_noise_is_trained_so():
    from diffusers.schedulers import DDIMScheduler

    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    plain = alphas_cumprod({**config, "rescale_betas_zero_snr": False})
    found = alphas_cumprod({**config, "rescale_betas_zero_snr": True})
    assert torch.equal(plain, alphas_cumprod(config))
    assert float(found[-1]) == 0 < float(plain[-1])
    theirs = DDIMScheduler(**config, rescale_betas_zero_snr=True).alphas_cumprod.double()
    assert_close(found, theirs, rtol=0, atol=1e-6)  # theirs are float32
    assert_close(rescaled_zero_terminal(found), found, rtol=0, atol=1e-15)


def test_without_a_word_for_it_the_betas_are_linear_as_in_diffusers():
    given = {"num_train_timesteps": 3, "beta_start": 0.1, "beta_end": 0.3}
    expected = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
    assert_close(alphas_cumprod(given), expected, rtol=1e-14, atol=0)


def test_an_unknown_schedule_is_named():
    config = {"beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "squaredcos_cap_v2"}
    with pytest.raises(WeightsError, match="beta_schedule 'squaredcos_cap_v2'; raylora knows"):
        alphas_cumprod(config)


def test_a_zero_terminal_schedule_is_the_old_ones_root_shifted_and_scaled():
    # Lin et al. 2023, algorithm 1, number by number
    before = alphas_cumprod(SD15)
    kept = before.clone()
    after = rescaled_zero_terminal(before)
    first, last = math.sqrt(before[0].item()), math.sqrt(before[-1].item())
    for t in (0, 1, 250, 500, 900, 998):
        root = (math.sqrt(before[t].item()) - last) * first / (first - last)
        assert after[t].item() == pytest.approx(root**2, rel=1e-12)
    assert after.dtype == torch.float64
    assert after[0] == before[0]
    assert after[-1] == 0
    assert (after.diff() < 0).all()
    assert torch.equal(before, kept)
    assert_close(rescaled_zero_terminal(after), after, rtol=1e-14, atol=0)


@pytest.mark.parametrize("end", [0.01, 0.012, 0.015, 0.02, 0.05])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_the_first_share_is_kept_to_the_bit(kind: str, end: float):
    before = alphas_cumprod({"beta_start": 1e-4, "beta_end": end, "beta_schedule": kind})
    after = rescaled_zero_terminal(before)
    assert (after[0], after[-1]) == (before[0], 0)


def test_sd_scripts_rescales_likewise():
    after = rescaled_zero_terminal(alphas_cumprod(SD15))[GOLDEN["timesteps"]]
    expected = torch.tensor(GOLDEN["alphas_cumprod"], dtype=torch.float64)
    # theirs is a product of fp32 numbers, each made of the one before: 2e-7 is left at the end
    assert_close(after[:5], expected[:5], rtol=1e-5, atol=0)
    assert_close(after[5:], expected[5:], rtol=2e-3, atol=0)
    snr = after / (1 - after)
    expected = torch.tensor(GOLDEN["snr"], dtype=torch.float64)
    assert_close(snr[1:5], expected[1:5], rtol=4e-5, atol=0)  # 1 - alpha, of fp32 alphas
    assert_close(snr[:1], expected[:1], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_diffusers_rescales_likewise():
    import diffusers

    theirs = diffusers.DDPMScheduler(**SD15, rescale_betas_zero_snr=True).alphas_cumprod.double()
    assert_close(rescaled_zero_terminal(alphas_cumprod(SD15)), theirs, rtol=5e-4, atol=1e-7)
