"""One base, ready to draw with any adapter: what a preview replica holds."""

from __future__ import annotations

import torch

from raylora.adapt.attach import Adapter, Attachment
from raylora.families import Family
from raylora.preview.options import PreviewOptions
from raylora.preview.renderer import draw_preview, png_bytes
from raylora.serving.library import Checkpoint, Library, Recent


class Studio:
    """A denoiser routed through its adapter once; each picture may set another one.

    Not for two threads at once: the adapter and its strength belong to the picture being drawn.

    Args:
        dtype: of the base and the activations.
        exact: of the adapter.
        adapters_held: how many adapters stay in memory.
    """

    def __init__(
        self,
        family: Family,
        *,
        dtype: torch.dtype,
        exact: torch.dtype,
        device: torch.device,
        adapters_held: int,
    ) -> None:
        self.family = family
        denoiser = family.load_denoiser(dtype=dtype, device=device)
        self._sites = family.sites(denoiser, "attention_mlp")
        self._attachment = Attachment(denoiser, family.component)
        self._attachment.attach(self._sites)
        self._renderer = family.load_renderer(denoiser)
        self._exact = exact
        self._device = device
        self._adapters: Recent[Adapter] = Recent(adapters_held)

    def draw(
        self,
        library: Library,
        checkpoint: Checkpoint | None,
        strength: float,
        options: PreviewOptions,
        prompt: str,
        *,
        stream: int,
    ) -> bytes:
        """A PNG; the same bytes for the same arguments, and as training draws its previews.

        Args:
            checkpoint: whose adapter; None is the base alone.
            stream: which noise of `options.seed`.
        """
        adapter = None
        if checkpoint is not None and strength != 0:
            found = checkpoint
            adapter = self._adapters.get(
                found.hash,
                lambda: library.load(found, self._sites, dtype=self._exact, device=self._device),
            )
            adapter.strength = strength
        self._attachment.adapter = adapter
        picture = draw_preview(self._renderer, self.family, options, prompt, number=stream)
        return png_bytes(picture)
