"""Drawing previews: the prompt, and starting noise that belongs to (seed, prompt) alone."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from raylora.base.seeds import draw_normal
from raylora.families import Family, Renderer
from raylora.preview.options import PreviewOptions


def draw_preview(
    renderer: Renderer, family: Family, options: PreviewOptions, prompt: str, *, number: int
) -> NDArray[np.uint8]:
    """One picture, (H, W, 3).

    Args:
        options: size, steps, guidance and the seed of the starting noise.
        number: which stream of the seed; equal numbers start from equal noise.
    """
    shape = (
        family.latent_channels,
        options.height // family.pixels_per_latent,
        options.width // family.pixels_per_latent,
    )
    noise = draw_normal(shape, seed=options.seed, step=0, sample=number, purpose="preview")
    return renderer.render(
        prompt,
        negative=options.negative,
        latents=torch.from_numpy(noise)[None],
        steps=options.steps,
        guidance=options.guidance,
    )


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    """A picture (H, W, 3) as a PNG file."""
    held = io.BytesIO()
    Image.fromarray(picture).save(held, format="PNG", optimize=True)
    return held.getvalue()
