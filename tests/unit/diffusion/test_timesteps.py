"""Which timesteps are drawn: closed forms, sd-scripts' own draws, and one draw a sample."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from raylora.base.seeds import draw_generator, sample_number, uniforms
from raylora.diffusion.process import Flow, Process
from raylora.diffusion.schedules import alphas_cumprod
from raylora.diffusion.timesteps import (
    TimestepOptions,
    draw_timesteps,
    make_timesteps,
    mode_share,
    resolution_mu,
    shifted,
    sigmoid,
    timestep_problems,
    tokens_of,
)

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "flux_timesteps.json").read_text()
)
FUNCTIONS = GOLDEN["functions"]
EPSILON = Process("epsilon", alphas_cumprod({"beta_start": 1e-4, "beta_end": 0.02}))
NUMBERS = [sample_number(f"{i}.png", 0) for i in range(4000)]
DEV = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SIZE = (64, 64)
FLOW = Flow()


def options(**words: Any) -> TimestepOptions:
    return TimestepOptions.model_validate(words).with_usual("logit_normal", None)


def draw(
    size: tuple[int, int] = SIZE,
    *,
    process: Any = FLOW,
    scheduler: dict[str, Any] = DEV,
    low: int = 0,
    high: int | None = None,
    **words: Any,
) -> torch.Tensor:
    source = make_timesteps(options(**words), process, scheduler, low=low, high=high)
    return source.draw(size, seed=1, step=7, samples=NUMBERS)


def assert_spread_as(drawn: torch.Tensor, cumulative: Any) -> None:
    """Kolmogorov and Smirnov: a right sample exceeds 2.2 / sqrt(n) once in 8,000 times."""
    sigmas = np.sort((drawn.double() / 1000).numpy())
    expected = np.array([cumulative(float(sigma)) for sigma in sigmas])
    count = len(sigmas)
    steps = np.arange(count + 1) / count
    distance = max(abs(expected - steps[1:]).max(), abs(expected - steps[:-1]).max())
    assert distance < 2.2 / math.sqrt(count)


def normal_share(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def unshifted(sigma: float, k: float) -> float:
    return sigma / (k - (k - 1) * sigma)


# -- the draws


def test_each_draw_has_the_distribution_of_its_formula():
    assert_spread_as(draw(draw="uniform"), lambda s: s)
    assert_spread_as(
        draw(draw="sigmoid", sigmoid_scale=1.7), lambda s: normal_share(logit(s) / 1.7)
    )
    assert_spread_as(
        draw(draw="logit_normal", mean=-0.6, std=0.8),
        lambda s: normal_share((logit(s) + 0.6) / 0.8),
    )
    u = np.linspace(0, 1, 100_001)
    table = np.array([mode_share(float(one), 1.29) for one in u])
    assert (np.diff(table) < 0).all()
    # the draw falls as u rises, so its cumulative is 1 - u
    assert_spread_as(draw(draw="mode"), lambda s: 1 - float(np.interp(s, table[::-1], u[::-1])))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_falls_from_noise_to_the_picture_at_every_scale_that_is_allowed(scale: float):
    found = [mode_share(u, scale) for u in np.linspace(0, 1, 2001).tolist()]
    assert found[0] == pytest.approx(1)
    assert found[-1] == pytest.approx(0, abs=1e-15)
    assert (np.diff(found) < 1e-12).all()


@pytest.mark.parametrize("case", GOLDEN["sampling"], ids=lambda case: json.dumps(case["args"]))
def test_the_draws_are_those_of_sd_scripts(case: dict[str, Any]):
    words = case["args"]
    kind, scheme = words["timestep_sampling"], words.get("weighting_scheme", "none")
    given: dict[str, Any] = {"draw": "uniform" if kind == "uniform" else "sigmoid"}
    if kind == "sigma":
        assert case["scheduler_shift"] == 1, "theirs go through a table, which is shifted"
        given = {"draw": "uniform" if scheme == "none" else scheme}
    if kind == "shift":
        given["shift"] = words["discrete_flow_shift"]
    if kind == "flux_shift":
        given["shift"] = "resolution"
    ours = draw(tuple(case["latent_hw"]), **given).double()
    shares = torch.tensor(case["quantile_p"], dtype=torch.float64)
    theirs = torch.tensor(case["ts_quantiles"], dtype=torch.float64)
    found = torch.tensor([float((ours <= q).double().mean()) for q in theirs])
    # Shares of two samples, of ours and theirs, at 4 of their deviations.
    deviation = (shares * (1 - shares) * (1 / len(NUMBERS) + 1 / case["n"])).sqrt()
    assert ((found - shares).abs() < 4 * deviation).all()
    spread = case["ts_std"] * math.sqrt(1 / len(NUMBERS) + 1 / case["n"])
    assert abs(float(ours.mean()) - case["ts_mean"]) < 4 * spread


def test_a_samples_timestep_does_not_depend_on_its_mates_and_moves_with_step_and_seed():
    for words in ({"draw": "uniform"}, {"draw": "logit_normal"}, {"draw": "mode"}):
        source = make_timesteps(options(**words, shift=3), FLOW, {})
        together = source.draw(SIZE, seed=1, step=7, samples=NUMBERS[:5])
        for i in range(5):
            alone = source.draw(SIZE, seed=1, step=7, samples=NUMBERS[i : i + 1])
            assert torch.equal(alone, together[i : i + 1])
        for other in ({"seed": 2}, {"step": 8}):
            moved = source.draw(SIZE, **{"seed": 1, "step": 7, "samples": NUMBERS[:5], **other})
            assert not (moved == together).any()


# -- shifts


def test_shift_moves_sigmas_as_the_paper_says():
    plain, moved = draw(draw="uniform").double() / 1000, draw(draw="uniform", shift=3.0).double()
    assert torch.allclose(moved / 1000, 3 * plain / (1 + 2 * plain), rtol=1e-6)
    assert_spread_as(moved, lambda s: unshifted(s, 3.0))
    assert torch.equal(draw(draw="uniform", shift="base"), draw(draw="uniform", shift=3.0))
    assert torch.equal(draw(draw="uniform", shift=1), draw(draw="uniform"))
    no_word = draw(draw="uniform", shift="base", scheduler={})
    assert torch.equal(no_word, draw(draw="uniform")), "diffusers' usual is 1"


def test_shifts_by_resolution_are_those_of_sd_scripts():
    for mu, values in FUNCTIONS["time_shift"].items():
        for t, value in zip(FUNCTIONS["t"], values, strict=True):
            assert shifted(t, math.exp(float(mu))) == pytest.approx(value, abs=1e-6)
    for tokens, mu in FUNCTIONS["lin_mu"].items():
        assert resolution_mu(int(tokens), {}) == pytest.approx(mu, abs=1e-12)
        assert resolution_mu(int(tokens), DEV) == pytest.approx(mu, abs=1e-12)
    other = {"base_shift": 0.0, "max_shift": 2.0, "base_image_seq_len": 100}
    assert resolution_mu(100, other) == 0
    assert resolution_mu(4096, {**other, "max_image_seq_len": None}) == pytest.approx(2.0)


def test_larger_pictures_are_shifted_more_each_by_its_own_size():
    assert tokens_of((128, 128)) == 4096
    assert tokens_of((96, 64)) == 48 * 32
    plain = draw(draw="uniform").double() / 1000
    for size, tokens in (((32, 32), 256), ((128, 96), 64 * 48)):
        k = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
        found = draw(size, draw="uniform", shift="resolution").double() / 1000
        assert torch.allclose(found, k * plain / (1 + (k - 1) * plain), rtol=1e-6)


def test_the_sigmoid_never_overflows():
    assert [sigmoid(x) for x in (-1e4, 0.0, 1e4)] == [0.0, 0.5, 1.0]
    assert sigmoid(-2.0) == pytest.approx(1 / (1 + math.exp(2)))


# -- ranges, kinds of timesteps


@pytest.mark.parametrize("chosen", ["uniform", "sigmoid", "logit_normal", "mode"])
@pytest.mark.parametrize("shift", [None, 3.0])
def test_flow_timesteps_are_any_numbers_above_0_within_the_range(chosen: str, shift: Any):
    whole = draw(draw=chosen, shift=shift)
    assert whole.dtype == torch.float32
    assert float(whole.min()) > 0
    assert float(whole.max()) <= 1000
    assert not torch.equal(whole, whole.round())
    part = draw(draw=chosen, shift=shift, low=200, high=600)
    assert 200 < float(part.min()) < float(part.max()) <= 600
    assert torch.allclose(part.double(), 200 + 0.4 * whole.double(), rtol=1e-6)


@pytest.mark.parametrize("chosen", ["sigmoid", "logit_normal", "mode"])
def test_timesteps_of_other_models_are_whole_within_the_range_and_spread_alike(chosen: str):
    whole = draw(draw=chosen, process=EPSILON)
    assert whole.dtype == torch.int64
    assert torch.equal(whole, draw(draw=chosen).long().clamp(max=999))
    part = draw(draw=chosen, process=EPSILON, low=995, high=1000)
    assert sorted(set(part.tolist())) == [995, 996, 997, 998, 999]


def test_uniform_timesteps_of_other_models_are_the_plain_draw():
    found = draw(draw="uniform", process=EPSILON, low=10, high=900)
    plain = draw_timesteps(low=10, high=900, seed=1, step=7, samples=NUMBERS)
    assert torch.equal(found, plain)


def test_a_draw_is_one_number_of_the_timesteps_own_stream():
    (found,) = make_timesteps(options(draw="uniform"), FLOW, {}).draw(
        SIZE, seed=5, step=6, samples=[9]
    )
    u = float(uniforms(draw_generator(5, 6, 9, "timestep"), 1)[0])
    assert float(found) == pytest.approx(1000 * (1 - u))
    normal = draw_generator(5, 6, 9, "timestep").standard_normal(dtype=np.float32)
    (found,) = make_timesteps(options(draw="logit_normal", mean=0.5), FLOW, {}).draw(
        SIZE, seed=5, step=6, samples=[9]
    )
    assert float(found) == pytest.approx(1000 / (1 + math.exp(-0.5 - float(normal))))


# -- what is usual, what is refused


def test_what_is_null_is_the_familys_usual_and_nothing_else_is():
    usual = TimestepOptions().with_usual("logit_normal", "resolution")
    assert (usual.draw, usual.shift) == ("logit_normal", "resolution")
    given = TimestepOptions(draw="mode", shift=2.0).with_usual("logit_normal", "resolution")
    assert (given.draw, given.shift) == ("mode", 2.0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"draw": "uniform", "sigmoid_scale": 2.0}, "timesteps.sigmoid_scale is 2, which only"),
        ({"draw": "sigmoid", "mean": 0.1}, "timesteps.mean is 0.1, which only logit_normal uses"),
        ({"draw": "mode", "std": 2.0}, "timesteps.std is 2, which only logit_normal uses"),
        ({"draw": "uniform", "mode_scale": 1.0}, "timesteps.mode_scale is 1, which only mode uses"),
        ({"shift": 0}, "greater than 0"),
        ({"shift": "flux"}, "'base' or 'resolution'"),
        ({"draw": "sigma"}, "'uniform', 'sigmoid', 'logit_normal' or 'mode'"),
        ({"mode_scale": 2}, "less than or equal to 1.75"),
    ],
)
def test_words_without_effect_and_wrong_ones_are_refused(words: dict[str, Any], told: str):
    with pytest.raises(ValidationError) as caught:
        TimestepOptions.model_validate(words)
    assert told in str(caught.value)


def test_words_that_the_familys_usual_draw_does_not_use_are_told():
    mean = TimestepOptions(mean=0.5)
    assert timestep_problems(mean.with_usual("logit_normal", "base"), FLOW, "sd3") == []
    (told,) = timestep_problems(mean.with_usual("uniform", None), EPSILON, "sd15")
    assert told.startswith(
        "timesteps.mean is 0.5, which only logit_normal uses, and timesteps.draw"
    )


@pytest.mark.parametrize("shift", [2.0, "base", "resolution"])
def test_only_flow_models_have_a_shift(shift: Any):
    given = TimestepOptions(shift=shift).with_usual("uniform", None)
    assert timestep_problems(given, FLOW, "flux1") == []
    (told,) = timestep_problems(given, EPSILON, "sd15")
    assert f"timesteps.shift is {shift}" in told
    assert "sd15 has 1000 fixed timesteps" in told


def test_mode_never_draws_a_picture_without_noise(monkeypatch: pytest.MonkeyPatch):
    """The largest u that there is means pure noise, so that what is left out is the clean end."""
    monkeypatch.setattr("raylora.diffusion.timesteps.uniforms", lambda generator, count: [0.0])
    for words in ({"draw": "uniform"}, {"draw": "mode", "mode_scale": 0.0}):
        source = make_timesteps(options(**words), FLOW, DEV)
        assert float(source.draw(SIZE, seed=0, step=0, samples=[1])) == 1000.0


def test_whole_timesteps_end_below_what_the_base_has():
    """A share that rounds to 1 would be one beyond the last."""
    given = options(draw="logit_normal", mean=60.0)
    source = make_timesteps(given, EPSILON, {}, high=800)
    assert source.draw(SIZE, seed=0, step=0, samples=NUMBERS[:8]).tolist() == [799] * 8
