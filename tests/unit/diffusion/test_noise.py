"""What is drawn for a sample belongs to (seed, step, sample) and to nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from raylora.base.seeds import draw_generator, draw_normal, sample_number, uniforms
from raylora.diffusion.noise import (
    NoiseOptions,
    draw_noise,
    make_noise,
    noise_problems,
    trained_process,
)
from raylora.diffusion.process import Process
from raylora.diffusion.schedules import alphas_cumprod, rescaled_zero_terminal
from raylora.diffusion.timesteps import draw_timesteps

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "losses.json").read_text()
)["noise"]
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


# -- what noise is like

EVERY: list[dict[str, Any]] = [
    {},
    {"offset": 0.1},
    {"offset": 0.1, "offset_random": True},
    {"offset": 0.1, "adaptive_scale": 0.05},
    {"offset": 0.1, "offset_random": True, "adaptive_scale": -0.05},
    {"multires_iterations": 6},
    {"multires_iterations": 8, "multires_discount": 0.8},
    {"input_perturbation": 0.1},
    {"input_perturbation": 0.1, "input_perturbation_random": True},
    {"offset": 0.1, "input_perturbation": 0.1},
    {"multires_iterations": 6, "input_perturbation": 0.1},
]
SHAPE = (4, 8, 6)


def options(**words: Any) -> NoiseOptions:
    return NoiseOptions.model_validate(words)


def pictures(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Latents whose channels lie at 0, 1, -2 and 3."""
    around = np.array([0.0, 1.0, -2.0, 3.0]).reshape(4, 1, 1)
    noise = np.random.default_rng(seed).normal(size=(count, *shape))
    return torch.from_numpy(around + 0.3 * noise).float()


def drawn(
    samples: list[int], latents: Tensor | None = None, *, step: int = 5, **words: Any
) -> tuple[Tensor, Tensor | None]:
    latents = pictures(len(samples)) if latents is None else latents
    return make_noise(options(**words)).draw(latents, seed=3, step=step, samples=samples)


def plain(samples: list[int], step: int = 5) -> Tensor:
    return draw_noise(SHAPE, seed=3, step=step, samples=samples)


def own(purpose: Any, shape: tuple[int, ...], number: int, step: int = 5) -> Tensor:
    values = draw_normal(shape, seed=3, step=step, sample=number, purpose=purpose)
    return torch.from_numpy(values).double()


def test_without_options_noise_is_plain_to_the_bit():
    noise, shown = drawn(NUMBERS)
    assert torch.equal(noise, plain(NUMBERS))
    assert shown is None


@pytest.mark.parametrize("words", EVERY, ids=str)
def test_draws_belong_to_seed_step_and_sample(words: dict[str, Any]):
    latents = pictures(6)
    noise, shown = drawn(NUMBERS[:6], latents, **words)
    assert noise.shape == latents.shape
    assert (noise.dtype, noise.device.type) == (torch.float32, "cpu")
    assert (shown is None) == ("input_perturbation" not in words)
    for order in ([0], [4, 1], [5, 4, 3, 2, 1, 0], [2, 2]):
        mates = [NUMBERS[i] for i in order]
        again, shown_again = drawn(mates, latents[order], **words)
        assert torch.equal(again, noise[order])
        assert shown is None or torch.equal(shown_again, shown[order])
    source = make_noise(options(**words))
    for other in ({"seed": 4}, {"step": 6}, {"samples": NUMBERS[6:12]}):
        changed = {"seed": 3, "step": 5, "samples": NUMBERS[:6], **other}
        assert not torch.isclose(source.draw(latents, **changed)[0], noise).all((1, 2, 3)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_is_float32_whatever_the_latents_are(dtype: torch.dtype):
    for words in EVERY:
        noise, _ = drawn(NUMBERS[:2], pictures(2).to(dtype), **words)
        assert noise.dtype == torch.float32
    exact = drawn(NUMBERS[:2], pictures(2), offset=0.1, adaptive_scale=0.05)[0]
    noise, _ = drawn(NUMBERS[:2], pictures(2).to(dtype), offset=0.1, adaptive_scale=0.05)
    assert_close(noise, exact, rtol=0, atol=2e-3)  # a mean of bf16 latents, times 0.05


def test_an_offset_is_one_normal_number_for_each_channel():
    many = [sample_number(f"{i}.png", 1) for i in range(1000)]
    noise, _ = drawn(many, torch.zeros(1000, 4, 8, 6), offset=0.25)
    change = (noise - plain(many)).double()
    assert_close(change, change[:, :, :1, :1].expand_as(change), rtol=0, atol=1e-6)
    shifts = change[:, :, 0, 0]
    expected = torch.stack([own("noise offset", (4, 1, 1), number) for number in many])
    assert_close(shifts, 0.25 * expected[:, :, 0, 0], rtol=0, atol=1e-6)
    # 4,000 numbers: five deviations of a mean, of a variance, of a likeness
    assert abs(shifts.mean()) < 5 * 0.25 / 4000**0.5
    assert abs(shifts.var() / 0.25**2 - 1) < 5 * (2 / 4000) ** 0.5
    likeness = np.corrcoef(shifts.T.numpy()) - np.eye(4)
    assert abs(likeness).max() < 5 / 1000**0.5


def test_sd_scripts_offsets_are_of_the_same_form():
    noise, latents = (torch.tensor(GOLDEN[word]).double() for word in ("noise", "latents"))
    offset = torch.tensor(GOLDEN["offset_0p1"]) - noise
    adaptive = torch.tensor(GOLDEN["offset_0p1_adaptive_0p05"]) - noise
    assert GOLDEN["delta_is_constant_per_channel"]
    # theirs are drawn alike in both: what is left is the strength, which is ours for these latents
    ratio = adaptive.mean((2, 3)) / offset.mean((2, 3))
    numbers = NUMBERS[:2]
    given = latents.float()
    source = [make_noise(options(offset=0.1, **more)) for more in ({}, {"adaptive_scale": 0.05})]
    fixed, scaled = (one.draw(given, seed=3, step=5, samples=numbers)[0] for one in source)
    base = draw_noise(tuple(given.shape[1:]), seed=3, step=5, samples=numbers)
    mine = (scaled - base).double().mean((2, 3)) / (fixed - base).double().mean((2, 3))
    assert_close(mine, ratio, rtol=1e-4, atol=0)  # small differences of float32 noise


@pytest.mark.parametrize("scale", [0.05, -0.05, 1.0])
def test_an_adaptive_offset_goes_by_the_means_of_the_latents_and_never_below_zero(scale: float):
    latents = pictures(6)
    noise, _ = drawn(NUMBERS[:6], latents, offset=0.1, adaptive_scale=scale)
    means = latents.double().mean((2, 3), keepdim=True).abs()
    strength = (0.1 + scale * means).clamp(min=0)
    numbers = torch.stack([own("noise offset", (4, 1, 1), number) for number in NUMBERS[:6]])
    expected = plain(NUMBERS[:6]).double() + strength * numbers
    assert_close(noise.double(), expected, rtol=0, atol=1e-6)
    unchanged = torch.equal(noise[:, 3], plain(NUMBERS[:6])[:, 3])
    assert unchanged == (scale < 0)  # 0.1 - 0.05 * 3


def strengths(found: Tensor, before: Tensor, numbers: Tensor) -> Tensor:
    """By least squares: how much of `numbers` each sample has more than before."""
    change = (found - before).double().flatten(1)
    numbers = numbers.expand_as(found).flatten(1)
    return (change * numbers).sum(1) / numbers.square().sum(1)


@pytest.mark.parametrize("random", ["offset_random", "input_perturbation_random"])
def test_a_random_strength_is_uniform_over_samples_and_steps(random: str):
    name = random.removesuffix("_random")
    purpose: Any = {"offset": "noise offset", "input_perturbation": "input noise"}[name]
    strength: Any = f"{purpose} strength"
    shape = (4, 1, 1) if name == "offset" else SHAPE
    found, expected = [], []
    for step in range(25):
        noise, shown = drawn(NUMBERS, step=step, **{name: 0.2, random: True})
        streams = [draw_generator(3, step, number, strength) for number in NUMBERS]
        expected += [uniforms(stream, 1)[0] for stream in streams]
        numbers = torch.stack([own(purpose, shape, number, step) for number in NUMBERS])
        after = noise if shown is None else shown
        found.append(strengths(after, plain(NUMBERS, step), numbers))
    shares = torch.cat(found) / 0.2
    # float32 noise hides the last digits of a strength by 2e-7 of the noise over that of the number
    assert_close(shares, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-3)
    counts = np.histogram(shares.clamp(0, 1).numpy(), bins=5, range=(0, 1))[0]
    assert counts.sum() == 1000
    assert abs(counts - 200).max() < 5 * np.sqrt(200 * 0.8)
    assert len(shares.unique()) == 1000


def test_a_perturbed_input_leaves_the_target_as_it_is():
    for words in ({}, {"offset": 0.1}, {"multires_iterations": 4}):
        target, _ = drawn(NUMBERS[:6], **words)
        noise, shown = drawn(NUMBERS[:6], input_perturbation=0.3, **words)
        assert torch.equal(noise, target)
        assert shown is not None
        numbers = torch.stack([own("input noise", SHAPE, number) for number in NUMBERS[:6]])
        assert_close(shown.double(), noise.double() + 0.3 * numbers, rtol=0, atol=1e-6)


def test_what_is_drawn_for_one_purpose_is_like_nothing_else():
    """Neither each other nor the noise: a purpose that was used twice would show."""
    number, shape = NUMBERS[0], (4, 32, 32)
    latents = torch.zeros(1, *shape)

    def draws(**words: Any) -> Tensor:
        noise, shown = make_noise(options(**words)).draw(latents, seed=3, step=5, samples=[number])
        return (noise if shown is None else shown)[0].double()

    base = draws()
    perturbation = draws(input_perturbation=1.0) - base
    coarse = draws(multires_iterations=1)
    field = coarse * (2**0.5) - base  # near enough: the deviation of the sum is nearly sqrt(2)
    rows = torch.stack([one.flatten() for one in (base, perturbation, field)])
    likeness = np.corrcoef(rows.numpy()) - np.eye(3)
    assert abs(likeness).max() < 5 / 4096**0.5


# -- the process that is trained

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_the_base_is_trained_as_it_is_where_nothing_is_asked():
    process = Process("epsilon", alphas_cumprod(SD15))
    assert trained_process(process, options()) is process
    assert trained_process(process, options(offset=0.1)) is process


def test_prediction_and_schedule_can_be_others_than_the_base_says():
    process = Process("epsilon", alphas_cumprod(SD15))
    found = trained_process(process, options(prediction="v_prediction", zero_terminal_snr=True))
    assert found.prediction == "v_prediction"
    assert torch.equal(found.alphas_cumprod, rescaled_zero_terminal(process.alphas_cumprod))
    # SNR after the rescale: none is left, where sd-scripts weighs by what there was before
    assert found.snr(torch.tensor([999])).item() == 0
    assert process.prediction == "epsilon"
    assert process.snr(torch.tensor([999])).item() > 0


def test_pure_noise_teaches_an_epsilon_model_nothing():
    epsilon, v = (Process(kind, alphas_cumprod(SD15)) for kind in ("epsilon", "v_prediction"))
    rescaled = options(zero_terminal_snr=True)
    assert noise_problems(rescaled, v) == noise_problems(options(), epsilon) == []
    [problem] = noise_problems(rescaled, epsilon)
    assert problem.startswith("noise.zero_terminal_snr: the last timestep would be pure noise")
    overridden = options(zero_terminal_snr=True, prediction="v_prediction")
    assert noise_problems(overridden, epsilon) == []
    overridden = options(zero_terminal_snr=True, prediction="epsilon")
    assert len(noise_problems(overridden, v)) == 1


# -- what is refused


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            {"offset_random": True},
            "noise.offset_random is true, and noise.offset is 0. Set offset, or leave "
            "offset_random out.",
        ),
        (
            {"adaptive_scale": -0.5},
            "noise.adaptive_scale is -0.5, and noise.offset is 0. Set offset, or leave "
            "adaptive_scale out.",
        ),
        (
            {"multires_discount": 0.8},
            "noise.multires_discount is 0.8, and noise.multires_iterations is 0. Set "
            "multires_iterations, or leave multires_discount out.",
        ),
        (
            {"input_perturbation_random": True},
            "noise.input_perturbation_random is true, and noise.input_perturbation is 0. Set "
            "input_perturbation, or leave input_perturbation_random out.",
        ),
        (
            {"offset": 0.1, "multires_iterations": 6},
            "noise.offset is 0.1 and noise.multires_iterations 6: multiresolution noise has the "
            "coarse part that an offset adds, and its division by the deviation would shrink the "
            "offset. Give "
            "one of them.",
        ),
    ],
)
def test_words_without_effect_are_refused(words: dict[str, Any], sentence: str):
    with pytest.raises(ValidationError) as caught:
        options(**words)
    assert caught.value.errors()[0]["msg"] == f"Value error, {sentence}"


@pytest.mark.parametrize("words", EVERY, ids=str)
def test_options_survive_their_own_record(words: dict[str, Any]):
    assert NoiseOptions.model_validate(options(**words).model_dump()) == options(**words)
