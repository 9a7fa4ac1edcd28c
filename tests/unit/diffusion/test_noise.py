"""What is drawn for a sample belongs to (seed, step, sample) and to nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylora.base.seeds import sample_number
from raylora.diffusion.noise import draw_noise, draw_timesteps

NUMBERS = [sample_number(f"{i}.png", 0) for i in range(40)]
some_numbers = st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=6)


@given(samples=some_numbers, step=st.integers(0, 10**6), seed=st.integers(0, 2**63 - 1))
def test_a_samples_draws_do_not_depend_on_its_mates(samples: list[int], step: int, seed: int):
    noise = draw_noise((4, 2, 3), seed=seed, step=step, samples=samples)
    timesteps = draw_timesteps(low=0, high=1000, seed=seed, step=step, samples=samples)
    for i, number in enumerate(samples):
        alone = draw_noise((4, 2, 3), seed=seed, step=step, samples=[number])
        assert torch.equal(noise[i], alone[0])
        alone = draw_timesteps(low=0, high=1000, seed=seed, step=step, samples=[number])
        assert timesteps[i] == alone[0]


def test_another_seed_step_or_sample_draws_other_numbers():
    first = draw_noise((4, 8, 8), seed=1, step=2, samples=[3])
    for other in ({"seed": 2}, {"step": 3}, {"samples": [4]}):
        drawn = draw_noise((4, 8, 8), **{"seed": 1, "step": 2, "samples": [3], **other})
        assert not torch.isclose(first, drawn).any()


def test_noise_is_standard_normal_in_float32():
    noise = draw_noise((4, 16, 16), seed=0, step=0, samples=NUMBERS)
    assert noise.dtype == torch.float32
    # 40,960 numbers: means within 1/200, variances within 1/140, five of either allowed
    assert abs(float(noise.mean())) < 0.025
    assert abs(float(noise.var()) - 1) < 0.035
    # no sample of the batch is like another
    likeness = np.corrcoef(noise.flatten(1).numpy()) - np.eye(40)
    assert abs(likeness).max() < 5.5 / 32


@pytest.mark.parametrize(("low", "high"), [(0, 1000), (200, 205)])
def test_timesteps_are_uniform_and_stay_below_high(low: int, high: int):
    drawn = torch.cat(
        [
            draw_timesteps(low=low, high=high, seed=0, step=step, samples=NUMBERS)
            for step in range(50)
        ]
    )
    assert drawn.dtype == torch.int64
    counts = np.histogram(drawn.numpy(), bins=5, range=(low, high))[0]
    assert counts.sum() == len(drawn) == 2000
    assert abs(counts - 400).max() < 5 * np.sqrt(400 * 0.8)
