"""One kernel for attention, wherever the denoiser attends, and what a device has not is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases import open_tiny
from torch import Tensor, nn
from torch.testing import assert_close

from raylora.base.errors import OptionError
from raylora.diffusion.attention import attending_by, attention, head_widths, kernel_problem
from raylora.memory.attending import check_kernel, predicting_by
from raylora.memory.checkpoint import again

CPU = torch.device("cpu")


def enabled() -> dict[str, bool]:
    """Which kernels torch may choose from now."""
    return {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn", "math"])
def test_a_prediction_and_what_is_computed_again_of_it_attend_by_one_kernel(kernel: Any):
    seen: list[dict[str, bool]] = []

    def block(x: Tensor) -> Tensor:
        seen.append(enabled())
        return x.sin()

    def predict(x: Tensor) -> Tensor:
        given: Tensor = again(block, x)
        return given

    before = enabled()
    x = torch.ones(3, requires_grad=True)
    given = predicting_by(kernel, predict)(x)
    assert enabled() == before
    given.sum().backward()
    assert enabled() == before
    assert seen == [{name: name == kernel for name in before}] * 2


def test_auto_leaves_the_prediction_as_it_is():
    def predict() -> None:
        """Never called."""

    assert predicting_by("auto", predict) is predict


@pytest.mark.parametrize("kernel", ["flash", "math"])
def test_kernels_agree_with_the_formula(kernel: Any):
    """softmax(q k^T / sqrt(W)) v, in float64."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 5, 32, generator=draw).double() for _ in range(3))
    with attending_by(kernel):
        given = attention(query, key, value, heads=2)
    split = [one.unflatten(-1, (2, 16)).transpose(1, 2) for one in (query, key, value)]
    weights = (split[0] @ split[1].mT / 4).softmax(-1)
    assert_close(given, (weights @ split[2]).transpose(1, 2).flatten(2), rtol=0, atol=1e-12)


def test_what_the_device_has_not_is_told_with_what_it_has():
    words: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "widths": [40, 64]}
    assert kernel_problem("auto", **words) is None
    assert kernel_problem("math", **words) is None
    told = kernel_problem("cudnn", **words)
    assert told is not None
    assert "memory.attention is cudnn" in told
    assert "no such kernel for the CPU with heads 40 wide in float32" in told
    assert "Choose flash or math" in told


def test_a_run_does_not_begin_with_a_kernel_that_is_not_there():
    class Layer(nn.Module):
        heads = 2
        to_q = nn.Linear(8, 32)

    check_kernel("flash", Layer(), device=CPU, dtype=torch.float32)
    with pytest.raises(OptionError, match="heads 16 wide"):
        check_kernel("efficient", Layer(), device=CPU, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "flux1"])
def test_widths_of_heads_are_those_of_the_config(kind: str):
    family = open_tiny(kind)
    denoiser = family.load_denoiser(dtype=torch.float32, device=CPU)
    config: Any = denoiser.config
    if kind == "flux1":
        assert head_widths(denoiser) == {config.attention_head_dim}
    else:  # there attention_head_dim is diffusers' word for how many there are
        widths = {width // config.attention_head_dim for width in config.block_out_channels}
        assert head_widths(denoiser) <= widths
        assert len(head_widths(denoiser)) == 2
