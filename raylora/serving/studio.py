"""One base, ready to draw with any adapter: what a preview replica holds."""

from __future__ import annotations

import torch

from raylora.adapt.attach import Adapter, Attachment
from raylora.adapt.onto import names_of
from raylora.diffusion.process import AnyProcess
from raylora.families import Family
from raylora.preview.options import PictureSettings
from raylora.preview.renderer import draw_preview, png_bytes
from raylora.serving.library import Checkpoint, Library, Recent


class Studio:
    """Models routed through their adapter once; each picture may set another one.

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
        encoders = family.load_text_encoders(dtype=dtype, device=device)
        self._sites = [*family.sites(denoiser), *family.text_sites(encoders)]
        models = {family.component: denoiser, **encoders}
        self._attachments = [Attachment(model, name) for name, model in models.items()]
        for held in self._attachments:
            held.attach([site for site in self._sites if site.component == held.component])
        self._names = names_of(family)
        self._renderer = family.load_renderer(denoiser, encoders, dtype=dtype, device=device)
        self._exact = exact
        self._device = device
        self._adapters: Recent[Adapter] = Recent(adapters_held)

    def draw(
        self,
        library: Library,
        checkpoint: Checkpoint | None,
        settings: PictureSettings,
        *,
        process: AnyProcess,
    ) -> bytes:
        """A PNG; the same bytes for the same arguments, and as training draws its previews.

        Args:
            checkpoint: whose adapter; None is the base alone.
            process: what its run trained.
        """
        adapter = None
        if checkpoint is not None and settings.strength != 0:
            found = checkpoint
            adapter = self._adapters.get(
                found.hash,
                lambda: library.load(
                    found, self._sites, self._names, dtype=self._exact, device=self._device
                ),
            )
        for held in self._attachments:
            held.adapter = adapter
        picture = draw_preview(
            self._renderer, self.family, settings, process=process, adapter=adapter
        )
        return png_bytes(picture)
