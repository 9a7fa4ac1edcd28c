"""Previews during training: pictures divided over workers, one object each."""

from __future__ import annotations

import torch

from raylora.base.storage import Storage
from raylora.families import Family, Renderer
from raylora.preview.options import PictureSettings, PreviewOptions
from raylora.preview.renderer import draw_preview, png_bytes
from raylora.training.parts import Parts


class Previews:
    """Draws every picture of a round at a step and stores `samples/<step>/<number>.png`.

    Training's own draws are not touched: they are functions of (seed, step, sample).

    Args:
        options: with the usual filled in.
    """

    def __init__(self, family: Family, options: PreviewOptions, storage: Storage) -> None:
        self._pictures = options.pictures()
        self._family = family
        self._storage = storage
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
        if self._renderer is None:
            # Text encoders that training reads are those that carry its adapter.
            encoders = parts.text_encoders or None
            self._renderer = self._family.load_renderer(parts.denoiser, encoders)
        with parts.as_drawn():
            picture = draw_preview(
                self._renderer, self._family, settings, process=parts.process, adapter=parts.adapter
            )
        self._storage.write(key, png_bytes(picture))


def sample_key(step: int, number: int) -> str:
    """Where a picture of a round lies in the run's folder; numbers as in `pictures()`."""
    return f"samples/{step:06d}/{number:03d}.png"
