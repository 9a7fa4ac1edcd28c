"""Samplers by name: how a picture is taken out of noise, step by step.

The schedulers are diffusers'. What is drawn while sampling comes from whoever asks for the picture,
and what an optional package would compute is computed here, so that a picture is a function of its
settings on every machine.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Literal

import torch
from numpy.polynomial import Polynomial
from torch import Tensor
from torch.overrides import TorchFunctionMode

from raylora.diffusion.process import AnyProcess, Flow

Sampler = Literal[
    "ddim",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver",
    "dpmsolver++",
    "dpmsingle",
    "k_lms",
    "k_euler",
    "k_euler_a",
    "k_dpm_2",
    "k_dpm_2_a",
]
DrawNoise = Callable[[int], Tensor]
"""Standard normal noise of the latents' shape; k is the k-th that a picture needs, from 1."""


@dataclass(frozen=True)
class _Scheduler:
    """A class of diffusers, and what it is given beside the base's own config.

    Attributes:
        from_pure_noise: whether it can start where nothing of the picture is left.
    """

    file: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    from_pure_noise: bool = False


_DDIM = _Scheduler("ddim", "DDIMScheduler", from_pure_noise=True)
# The warm-up by Runge-Kutta is of the paper; Stable Diffusion's own config leaves it out.
_PNDM = _Scheduler("pndm", "PNDMScheduler", {"skip_prk_steps": True})
_LMS = _Scheduler("lms_discrete", "LMSDiscreteScheduler")
_EULER = _Scheduler("euler_discrete", "EulerDiscreteScheduler", from_pure_noise=True)
_EULER_A = _Scheduler(
    "euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", from_pure_noise=True
)
_DPM_2 = _Scheduler("k_dpm_2_discrete", "KDPM2DiscreteScheduler")
_DPM_2_A = _Scheduler("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler")
_MULTISTEP = ("dpmsolver_multistep", "DPMSolverMultistepScheduler")
# The first form of the solver divides by the last sigma, which may not be zero.
_DPMSOLVER = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
_SCHEDULERS: dict[Sampler, _Scheduler] = {
    "ddim": _DDIM,
    "pndm": _PNDM,
    "lms": _LMS,
    "euler": _EULER,
    "euler_a": _EULER_A,
    "heun": _Scheduler("heun_discrete", "HeunDiscreteScheduler"),
    "dpm_2": _DPM_2,
    "dpm_2_a": _DPM_2_A,
    "dpmsolver": _Scheduler(*_MULTISTEP, _DPMSOLVER, from_pure_noise=True),
    "dpmsolver++": _Scheduler(*_MULTISTEP, {"algorithm_type": "dpmsolver++"}, from_pure_noise=True),
    "dpmsingle": _Scheduler(
        "dpmsolver_singlestep", "DPMSolverSinglestepScheduler", {"lower_order_final": True}
    ),
    "k_lms": _LMS,
    "k_euler": _EULER,
    "k_euler_a": _EULER_A,
    "k_dpm_2": _DPM_2,
    "k_dpm_2_a": _DPM_2_A,
}


_FLOW_SAMPLERS: tuple[Sampler, ...] = ("euler", "heun")
"""What flow models are sampled by; the others go by a schedule of signal and noise."""


def starts_from_pure_noise(process: AnyProcess) -> bool:
    """Whether the last timestep holds nothing of the picture (zero-terminal SNR, and flows)."""
    return isinstance(process, Flow) or float(process.alphas_cumprod[-1]) == 0.0


def sampler_names(process: AnyProcess) -> list[Sampler]:
    """Those that can draw with what was trained."""
    if isinstance(process, Flow):
        return list(_FLOW_SAMPLERS)
    pure = starts_from_pure_noise(process)
    return [name for name, held in _SCHEDULERS.items() if held.from_pure_noise or not pure]


def sampler_problems(samplers: Iterable[Sampler], process: AnyProcess) -> list[str]:
    """Samplers that cannot draw with what was trained, one sentence each.

    Args:
        process: as it is trained (`noise.trained_process`).
    """
    able = sampler_names(process)
    wrong = [name for name in dict.fromkeys(samplers) if name not in able]
    if isinstance(process, Flow):
        return [f"{name} is not for flow models. Choose {' or '.join(able)}." for name in wrong]
    return [
        f"{name} cannot start from pure noise, which noise.zero_terminal_snr trains. Choose one of "
        f"{', '.join(able)}."
        for name in wrong
    ]


def make_sampler(
    name: Sampler,
    config: Mapping[str, Any],
    *,
    process: AnyProcess | None = None,
    noise: DrawNoise | None = None,
) -> Any:
    """A fresh scheduler of diffusers for one picture.

    Args:
        config: the base's own scheduler config.
        process: what was trained; None is what the config says, of a base that is no flow model.
            From it come what is predicted and, where the last timestep was pure noise, rescaled
            betas and steps that begin there. Of a flow model the config says all.
        noise: what samplers that draw are given; others draw nothing.

    Source: Lin et al. 2023, arXiv 2305.08891 (trailing steps).
    """
    if isinstance(process, Flow):
        return _flow_sampler(name, config)
    held = _SCHEDULERS[name]
    words = dict(held.arguments)
    if process is not None:
        words["prediction_type"] = process.prediction
        if starts_from_pure_noise(process):
            words |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{held.file}")
    with warnings.catch_warnings():
        # diffusers would rather not have the first form of the solver; a person asked for it.
        warnings.filterwarnings("ignore", message=".*algorithm_types? dpmsolver", append=False)
        scheduler = getattr(module, held.name).from_config(config, **words)
    if held is _LMS:
        scheduler.get_lms_coefficient = partial(_lms_coefficient, scheduler)
    scheduler.step = _with_noise(scheduler.step, noise)
    return scheduler


def _flow_sampler(name: Sampler, config: Mapping[str, Any]) -> Any:
    """Both take the sigmas and shifts that the base's pipeline hands on."""
    assert name in _FLOW_SAMPLERS, "sampler_problems refuses it"
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from diffusers.schedulers.scheduling_flow_match_heun_discrete import (
        FlowMatchHeunDiscreteScheduler,
    )

    euler = FlowMatchEulerDiscreteScheduler.from_config(config)
    if name == "euler":
        return euler
    heun = FlowMatchHeunDiscreteScheduler.from_config(config)
    own = heun.set_timesteps

    def set_timesteps(
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        # diffusers' own knows neither given sigmas nor a shift by resolution: it takes Euler's.
        euler.set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu)
        own(len(euler.timesteps), device=device)
        first, later, last = euler.sigmas[:1], euler.sigmas[1:-1], euler.sigmas[-1:]
        heun.sigmas = torch.cat([first, later.repeat_interleave(2), last])
        heun.timesteps = heun.sigmas[:-1] * heun.config.num_train_timesteps

    heun.set_timesteps = set_timesteps
    return heun


def _lms_coefficient(scheduler: Any, order: int, t: int, current_order: int) -> float:
    return lms_coefficient([float(s) for s in scheduler.sigmas], order, t, current_order)


def lms_coefficient(sigmas: list[float], order: int, step: int, which: int) -> float:
    """Weight of an earlier slope in a linear multistep: the integral of its Lagrange polynomial.

    diffusers asks scipy for the integral; a polynomial's is known.

    Args:
        sigmas: falling.
        order: how many slopes are held, the newest at `sigmas[step]`.
        which: 0 is the newest.
    """
    here = sigmas[step]  # moved to 0, where sums lose least
    nodes = [sigmas[step - k] - here for k in range(order)]
    own = nodes.pop(which)
    basis = Polynomial([1.0])
    for node in nodes:
        basis *= Polynomial([-node, 1.0]) / (own - node)
    return float(basis.integ()(sigmas[step + 1] - here))


def _with_noise(step: Callable[..., Any], noise: DrawNoise | None) -> Callable[..., Any]:
    """The scheduler's step, with its noise from `noise` and not from torch's generators."""
    given = _Noise(noise)

    @wraps(step)
    def stepped(*arguments: Any, **words: Any) -> Any:
        with given:
            return step(*arguments, **words)

    return stepped


class _Noise(TorchFunctionMode):
    """Within it, normal noise is ours; diffusers asks torch for it and nobody else."""

    def __init__(self, noise: DrawNoise | None) -> None:
        super().__init__()
        self._noise = noise
        self._drawn = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        words = kwargs or {}
        if func is not torch.randn:
            return func(*args, **words)
        assert self._noise is not None, "this sampler draws noise, and none was given"
        self._drawn += 1
        drawn = self._noise(self._drawn)
        assert tuple(drawn.shape) == tuple(args[0])
        return drawn.to(device=words["device"], dtype=words["dtype"])
