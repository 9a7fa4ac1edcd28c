"""The autoencoder between pixels and latents, as diffusers' AutoencoderKL builds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylora.base.errors import WeightsError
from raylora.components.lent import Lender, Load
from raylora.diffusion.halving import in_halves
from raylora.weights.base import Base
from raylora.weights.fill import fill

_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""The middle's attention as diffusers named it before 0.18, and as SD 1.5's own file still does."""
TILE = 512
"""Side in pixels of a tile that is decoded alone."""


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


@dataclass(frozen=True)
class Tiling:
    """Whether pictures are decoded whole or in tiles.

    Attributes:
        mode: auto: in tiles where a whole picture would not fit.
        free_bytes: what a decoding may take, asked just before it.
    """

    mode: Literal["auto"] | bool = False
    free_bytes: Callable[[], float] = lambda: float("inf")


class Decoder:
    """A VAE that is lent for each picture, and what comes out of it.

    Args:
        load_vae: gives it in the dtype that it decodes in.
    """

    def __init__(
        self, load_vae: Load, facts: VaeFacts, lender: Lender, tiling: Tiling | None = None
    ) -> None:
        self._load, self._facts, self._lender = load_vae, facts, lender
        self._tiling = tiling or Tiling()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) as the denoiser has them -> (B, 3, H, W), -1..1 and a little beyond."""
        with self._lender.lend("vae", self._load) as vae:
            pixels = self._decode(vae, latents)
        self._lender.clear()
        return pixels

    def _decode(self, vae: Any, latents: Tensor) -> Tensor:
        mode = self._tiling.mode
        scaled = latents.to(vae.dtype) / self._facts.scaling
        if self._facts.shift:
            scaled = scaled + self._facts.shift
        if mode is True:
            return decode_in_tiles(vae, scaled)
        if mode is False:
            return decode_whole(vae, scaled)
        if whole_bytes(vae.config["block_out_channels"], scaled) <= self._tiling.free_bytes():
            try:
                return decode_whole(vae, scaled)
            except torch.OutOfMemoryError:
                pass  # on with tiles outside of it: its traceback holds tensors
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return decode_in_tiles(vae, scaled)


def encoding_bytes(channels: Sequence[int], number_bytes: int = 4) -> int:
    """What a VAE takes at its fullest for each pixel that it encodes, without weights: five times
    what its first level holds.

    Args:
        channels: its `block_out_channels`.
    """
    return 5 * channels[0] * number_bytes


def whole_bytes(channels: Sequence[int], scaled: Tensor) -> int:
    """What decoding whole pictures takes at its fullest, without weights.

    That is behind the last doubling of the sides, within the first block there: what it is given,
    what that is once it is normed, and its activation, all of as many channels as the level before
    has.

    Args:
        channels: the VAE's `block_out_channels`.
        scaled: (B, C, h, w), in the dtype that is decoded in.
    """
    batch, _, height, width = scaled.shape
    pixels = batch * height * width * 4 ** (len(channels) - 1)
    most: int = 3 * channels[min(1, len(channels) - 1)] * pixels * scaled.element_size()
    return most


def decode_whole(vae: Any, scaled: Tensor) -> Tensor:
    """Latents, without the scale and the shift of the config, to pictures."""
    decoded: Tensor = vae.decode(scaled, return_dict=False)[0]
    return decoded


def decode_in_tiles(vae: Any, scaled: Tensor, *, tile: int = TILE) -> Tensor:
    """The same in overlapping tiles of so many pixels a side, blended where they meet.

    Each tile is normed by itself, so that pictures differ a little. A picture that is no larger
    than a tile is decoded whole.
    """
    # The config's own tiles may be as large as the picture: 1024 pixels for SDXL and FLUX.
    vae.tile_sample_min_size = tile
    vae.tile_latent_min_size = tile // 2 ** (len(vae.config["block_out_channels"]) - 1)
    vae.enable_tiling()
    try:
        # One picture after the other.
        return torch.cat([decode_whole(vae, one) for one in scaled.split(1)])
    finally:
        vae.disable_tiling()  # it would tile what is encoded too, which changes latents


def decoding_dtype(base: Base, dtype: torch.dtype) -> torch.dtype:
    """What the VAE decodes in: float32 where its config says that float16 is too narrow for it."""
    forced = bool(base.config("vae").get("force_upcast", True))
    return torch.float32 if forced and dtype == torch.float16 else dtype
