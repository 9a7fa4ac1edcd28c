"""The autoencoder between pixels and latents, as diffusers' AutoencoderKL builds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylora.base.errors import WeightsError
from raylora.diffusion.halving import in_halves
from raylora.weights.base import Base
from raylora.weights.fill import fill

_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""The middle's attention as diffusers named it before 0.18, and as SD 1.5's own file still does."""


@dataclass(frozen=True)
class VaeFacts:
    """What a VAE's config says.

    Attributes:
        pixels_per_latent: how many pixels one latent cell spans.
        channels: of the latents.
        scaling, shift: latents are (what the VAE gives - shift) * scaling.
    """

    pixels_per_latent: int
    channels: int
    scaling: float
    shift: float


def vae_facts(base: Base, *, kind: str) -> VaeFacts:
    """What the VAE's config says, without its weights.

    Args:
        kind: the family, for the sentence.

    Raises:
        WeightsError: it is another kind of autoencoder.
    """
    config = base.config("vae")
    found = config.get("_class_name", "AutoencoderKL")
    if found != "AutoencoderKL":
        raise WeightsError(
            f"{base.name}: its VAE is a {found}, {kind} needs a AutoencoderKL. Choose the family "
            "that fits the weights, or set family.vae."
        )
    return VaeFacts(
        pixels_per_latent=2 ** (len(config["block_out_channels"]) - 1),
        channels=int(config.get("latent_channels", 4)),
        scaling=float(config.get("scaling_factor", 0.18215)),
        shift=float(config.get("shift_factor") or 0.0),
    )


def load_vae(base: Base, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen VAE, filled from the base's weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):
        vae: nn.Module = AutoencoderKL.from_config(base.config("vae"))
    weights = {_newer_name(name): tensor for name, tensor in base.weights("vae").items()}
    return fill(vae, weights, dtype=dtype, device=device).requires_grad_(False).eval()


def _newer_name(name: str) -> str:
    before, middle, rest = name.partition(".attentions.0.")
    layer, dot, word = rest.partition(".")
    return f"{before}{middle}{_OLD_NAMES.get(layer, layer)}{dot}{word}"


@torch.no_grad()
def encode_pixels(vae: Any, pixels: NDArray[np.float32], facts: VaeFacts) -> NDArray[np.float32]:
    """Pictures' latents by the mode of what the VAE gives, which no draw changes.

    Args:
        pixels: (B, 3, H, W) in -1..1.

    Returns:
        (B, C, h, w) float32, of about standard deviation 1.
    """

    def encode(batch: Tensor) -> Tensor:
        latents: Tensor = vae.encode(
            batch.to(device=vae.device, dtype=vae.dtype)
        ).latent_dist.mode()
        if facts.shift:
            latents = latents - facts.shift
        return (latents * facts.scaling).float().cpu()

    encoded: NDArray[np.float32] = in_halves(encode, torch.from_numpy(pixels)).numpy()
    return encoded


def decoding_dtype(base: Base, dtype: torch.dtype) -> torch.dtype:
    """What the VAE decodes in: float32 where its config says that float16 is too narrow for it."""
    forced = bool(base.config("vae").get("force_upcast", True))
    return torch.float32 if forced and dtype == torch.float16 else dtype
