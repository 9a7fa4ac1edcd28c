"""The VAE: latents as its config scales and shifts them, old names, and what it decodes in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from true_configs import SDXL, VAE, Configured

from raylora.base.errors import WeightsError
from raylora.components import vae as vae_file
from raylora.components.lent import Keeps
from raylora.components.vae import (
    Decoder,
    Tiling,
    decode_in_tiles,
    decode_whole,
    decoding_dtype,
    encode_pixels,
    encoding_bytes,
    load_vae,
    vae_facts,
    whole_bytes,
)
from raylora.memory.tracker import PeakTracker

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
PIXELS = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 24)).astype(np.float32)


class Weighted(Configured):
    """A VAE with weights."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        super().__init__({"vae": config})
        self._weights = weights

    def weights(self, component: str) -> dict[str, Tensor]:
        assert component == "vae"
        return self._weights


def made(**words: Any) -> Any:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(**{**TINY, **words}).requires_grad_(False).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        {"scaling_factor": 0.18215},
        {"scaling_factor": 0.3611, "shift_factor": 0.1159, "latent_channels": 16,
         "use_quant_conv": False, "use_post_quant_conv": False},
    ],
)  # fmt: skip
def test_latents_are_shifted_and_scaled_as_the_config_says(words: dict[str, Any]):
    theirs = made(**words)
    base = Weighted({**TINY, **words}, theirs.state_dict())
    facts = vae_facts(base, kind="some")
    ours = load_vae(base, dtype=torch.float32, device=CPU)
    assert not any(weight.requires_grad for weight in ours.parameters())
    found = encode_pixels(ours, PIXELS, facts)
    mode = theirs.encode(torch.from_numpy(PIXELS)).latent_dist.mode()
    expected = (mode - words.get("shift_factor", 0)) * words["scaling_factor"]
    assert found.dtype == np.float32
    assert (facts.channels, facts.pixels_per_latent) == (words.get("latent_channels", 4), 2)
    assert found.shape == (2, facts.channels, 8, 12)
    assert_close(found, expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_file_of_diffusers_first_names_is_the_same_vae():
    theirs = made()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, held in theirs.state_dict().items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        weights[name] = held
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in weights
    assert not any("to_" in name for name in weights)
    ours = load_vae(Weighted(TINY, weights), dtype=torch.float32, device=CPU)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, held in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], held), name


def test_facts_are_those_of_the_config():
    facts = vae_facts(Configured({"vae": VAE}), kind="sd15")
    assert (facts.pixels_per_latent, facts.channels) == (8, 4)
    assert (facts.scaling, facts.shift) == (0.18215, 0.0)


def test_another_kind_of_autoencoder_is_refused():
    base = Configured({"vae": {**VAE, "_class_name": "AutoencoderDC"}}, name="some-base")
    with pytest.raises(WeightsError, match="some-base: its VAE is a AutoencoderDC, sdxl needs a"):
        vae_facts(base, kind="sdxl")


@pytest.mark.parametrize(
    ("words", "dtype", "found"),
    [
        ({"force_upcast": True}, torch.float16, torch.float32),
        ({}, torch.float16, torch.float32),
        ({"force_upcast": False}, torch.float16, torch.float16),
        ({"force_upcast": True}, torch.bfloat16, torch.bfloat16),
        ({"force_upcast": True}, torch.float64, torch.float64),
    ],
)
def test_float16_is_too_narrow_for_a_vae_that_says_so(
    words: dict[str, Any], dtype: torch.dtype, found: torch.dtype
):
    assert decoding_dtype(Configured({"vae": {**VAE, **words}}), dtype) == found


# -- decoding

LATENTS = torch.linspace(-2, 2, 4 * 16 * 12).sin().view(1, 4, 16, 12)


@pytest.mark.slow
def test_pictures_are_what_the_inverse_of_encodings_scale_and_shift_decodes_to():
    words = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    theirs = made(**words)
    base = Weighted({**TINY, **words}, theirs.state_dict())
    decoder = Decoder(
        lambda device: load_vae(base, dtype=torch.float32, device=device),
        vae_facts(base, kind="some"),
        Keeps(CPU),
    )
    expected = theirs.decode(LATENTS / 0.3611 + 0.1159).sample
    assert torch.equal(decoder.decode(LATENTS), expected)


def test_tiles_hold_less_and_leave_encoding_as_it_was():
    vae, pixels = made(), torch.from_numpy(PIXELS)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
        held, peaks = [], []
        for decode in (decode_whole, lambda one, z: decode_in_tiles(one, z, tile=16)):
            with PeakTracker() as tracker:
                tracker.begin()
                held.append(decode(vae, LATENTS))
            peaks.append(tracker.peak_bytes)
        assert torch.equal(vae.encode(pixels).latent_dist.mode(), latents)
        # As large as a tile is whole.
        assert torch.equal(decode_in_tiles(vae, LATENTS, tile=32), held[0])
    assert held[1].shape == held[0].shape == (1, 3, 32, 24)
    assert 0 < (held[1] - held[0]).abs().mean() < held[0].std()
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("mode", ["auto", False])
def test_where_a_whole_picture_runs_out_of_memory_auto_takes_tiles(mode: Any, monkeypatch: Any):
    tried: list[str] = []

    def full(vae: Any, scaled: Tensor) -> Tensor:
        tried.append("whole")
        raise torch.OutOfMemoryError("full")

    def tiles(vae: Any, scaled: Tensor) -> Tensor:
        tried.append("tiles")
        return scaled

    monkeypatch.setattr(vae_file, "decode_whole", full)
    monkeypatch.setattr(vae_file, "decode_in_tiles", tiles)
    facts = vae_facts(Weighted(TINY, {}), kind="some")
    decoder = Decoder(lambda device: made(), facts, Keeps(CPU), Tiling(mode))
    if mode == "auto":
        decoder.decode(LATENTS)
        assert tried == ["whole", "tiles"]
    else:
        with pytest.raises(torch.OutOfMemoryError):
            decoder.decode(LATENTS)
        assert tried == ["whole"]


@pytest.mark.slow
@pytest.mark.parametrize("config", [VAE, SDXL["vae"]], ids=["sd15", "sdxl"])
@pytest.mark.parametrize(("batch", "width"), [(1, 512), (2, 768)])
def test_what_encoding_and_decoding_take_is_what_their_operations_hold(
    config: dict[str, Any], batch: int, width: int
):
    from diffusers import AutoencoderKL

    channels = config["block_out_channels"]
    with torch.device("meta"), torch.no_grad():
        vae: Any = AutoencoderKL.from_config(config)
        pixels, latents = torch.empty(batch, 3, 512, width), torch.empty(batch, 4, 64, width // 8)
        for work, given, foreseen in (
            (vae.encode, pixels, encoding_bytes(channels) * batch * 512 * width),
            (vae.decode, latents, whole_bytes(channels, latents)),
        ):
            with PeakTracker() as tracker:
                tracker.begin()
                work(given)
            # Small tensors beside them: statistics of norms, the latents.
            assert foreseen <= tracker.peak_bytes < 1.001 * foreseen
