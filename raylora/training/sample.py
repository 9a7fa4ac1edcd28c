"""Previews during training: pictures divided over workers, one object each."""

from __future__ import annotations

import torch

from raylora.base.storage import Storage
from raylora.components.lent import Lender
from raylora.components.vae import Tiling
from raylora.families import Family, Renderer
from raylora.preview.options import PictureSettings, PreviewOptions
from raylora.preview.renderer import draw_preview, png_bytes
from raylora.training.parts import Parts


class Previews:
    """Draws every picture of a round at a step and stores `samples/<step>/<number>.png`.

    Training's own draws are not touched: they are functions of (seed, step, sample).

    Args:
        options: with the usual filled in.
        lender: has the VAE, and the text encoders where training does not, on the device while they
            are needed; None keeps them there.
        tiling: of decoding; None is whole.
    """

    def __init__(
        self,
        family: Family,
        options: PreviewOptions,
        storage: Storage,
        lender: Lender | None = None,
        tiling: Tiling | None = None,
    ) -> None:
        self._pictures = options.pictures()
        self._family = family
        self._storage = storage
        self._lender, self._tiling = lender, tiling
        self._renderer: Renderer | None = None

    def draw(self, parts: Parts, step: int) -> int:
        """Draw this worker's pictures of the round that are not stored yet, and wait for all.

        Returns:
            How many pictures of all workers did not fit into memory; no run ends for that.
        """
        left_out = 0
        for number in range(parts.group.rank, len(self._pictures), parts.group.size):
            if self._storage.entry(sample_key(step, number)) is not None:
                continue
            try:
                self._draw(parts, sample_key(step, number), self._pictures[number])
            except torch.OutOfMemoryError:
                left_out += 1
        return int(sum(row[0] for row in parts.group.gather([float(left_out)])))

    def _draw(self, parts: Parts, key: str, settings: PictureSettings) -> None:
        self._renderer = self._renderer or self._make_renderer(parts)
        with parts.as_drawn():
            picture = draw_preview(
                self._renderer, self._family, settings, process=parts.process, adapter=parts.adapter
            )
        self._storage.write(key, png_bytes(picture))

    def _make_renderer(self, parts: Parts) -> Renderer:
        """Its prompts are read, by the encoders that training reads with, which carry its adapter,
        whenever they are drawn; by the base's own once in a run."""
        renderer = self._family.load_renderer(
            parts.denoiser,
            parts.text_encoders or None,
            dtype=parts.dtype,
            device=parts.device,
            lender=self._lender,
            tiling=self._tiling,
        )
        mine = self._pictures[parts.group.rank :: parts.group.size]
        negatives = [one.negative for one in mine if one.guidance > 1]
        renderer.read([*(one.prompt for one in mine), *negatives])
        return renderer


def sample_key(step: int, number: int) -> str:
    """Where a picture of a round lies in the run's folder; numbers as in `pictures()`."""
    return f"samples/{step:06d}/{number:03d}.png"
