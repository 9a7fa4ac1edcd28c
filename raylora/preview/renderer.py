"""Drawing previews: noise belongs to (seed, prompt) alone, and the adapter stays as it was."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raylora.adapt.attach import Adapter
from raylora.base.seeds import draw_normal
from raylora.diffusion.process import AnyProcess
from raylora.families import Family, Renderer
from raylora.preview.options import PictureSettings


def draw_preview(
    renderer: Renderer,
    family: Family,
    settings: PictureSettings,
    *,
    process: AnyProcess,
    adapter: Adapter | None = None,
) -> NDArray[np.uint8]:
    """One picture, (H, W, 3).

    Args:
        process: what was trained (`trained_process`), which may differ from the base's own.
        adapter: which the renderer's models carry; it has the picture's strength meanwhile.
    """

    def noise(draw: int) -> Tensor:
        shape = (
            family.latent_channels,
            settings.height // family.pixels_per_latent,
            settings.width // family.pixels_per_latent,
        )
        drawn = draw_normal(
            shape, seed=settings.seed, step=draw, sample=settings.stream, purpose="preview"
        )
        return torch.from_numpy(drawn)[None]

    with _at_strength(adapter, settings.strength):
        return renderer.render(
            settings.prompt,
            negative=settings.negative,
            latents=noise(0),
            steps=settings.steps,
            guidance=settings.guidance,
            sampler=settings.sampler,
            noise=noise,
            process=process,
            embedded_guidance=settings.embedded_guidance,
        )


@contextmanager
def _at_strength(adapter: Adapter | None, strength: float) -> Iterator[None]:
    if adapter is None:
        yield
        return
    before, adapter.strength = adapter.strength, strength
    try:
        yield
    finally:
        adapter.strength = before


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    """A picture (H, W, 3) as a PNG file."""
    held = io.BytesIO()
    Image.fromarray(picture).save(held, format="PNG", optimize=True)
    return held.getvalue()
