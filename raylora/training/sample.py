"""Previews during training: prompts divided over workers, one object a picture."""

from __future__ import annotations

import torch

from raylora.base.storage import Storage
from raylora.families import Family, Renderer
from raylora.preview.options import PreviewOptions
from raylora.preview.renderer import draw_preview, png_bytes
from raylora.training.parts import Parts


class Previews:
    """Draws every prompt at a step and stores `samples/<step>/<prompt>.png`.

    Training's own draws are not touched: they are functions of (seed, step, sample).
    """

    def __init__(self, family: Family, options: PreviewOptions, storage: Storage) -> None:
        self.options = options
        self._family = family
        self._storage = storage
        self._renderer: Renderer | None = None

    def draw(self, parts: Parts, step: int) -> int:
        """Draw this worker's prompts of the round that are not stored yet, and wait for all.

        Returns:
            How many pictures of all workers did not fit into memory; no run ends for that.
        """
        left_out = 0
        for number in range(parts.group.rank, len(self.options.prompts), parts.group.size):
            if self._storage.entry(sample_key(step, number)) is not None:
                continue
            try:
                self._draw(parts, step, number)
            except torch.OutOfMemoryError:
                left_out += 1
        return int(sum(row[0] for row in parts.group.gather([float(left_out)])))

    def _draw(self, parts: Parts, step: int, number: int) -> None:
        if self._renderer is None:
            self._renderer = self._family.load_renderer(parts.denoiser)
        prompt = self.options.prompts[number]
        picture = draw_preview(self._renderer, self._family, self.options, prompt, number=number)
        self._storage.write(sample_key(step, number), png_bytes(picture))


def sample_key(step: int, number: int) -> str:
    """Where the picture of a prompt at a step lies in the run's folder."""
    return f"samples/{step:06d}/{number:03d}.png"
