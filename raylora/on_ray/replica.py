"""A replica of the preview endpoint: one base on one device, drawing with any adapter."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from raylora.base.errors import MissingObject, OptionError, UserError
from raylora.base.log import start_logging
from raylora.base.storage import open_storage
from raylora.gallery import Gallery, Picture
from raylora.on_ray.resources import stand_in
from raylora.serving.library import Checkpoint
from raylora.serving.options import RenderRequest, ServeOptions


@dataclass(frozen=True)
class Refusal:
    """One sentence in place of a picture."""

    status: int
    detail: str

    @staticmethod
    def of(error: UserError) -> Refusal:
        """404 for what is not there, 422 for what cannot be asked, 500 for a spoilt store."""
        kinds = {MissingObject: 404, OptionError: 422}
        return Refusal(kinds.get(type(error), 500), str(error))


class Replica:
    """Draws one picture after the other in a thread, so that it always answers Serve.

    Args:
        folder: what relative paths in the runs' jobs are relative to.
    """

    def __init__(self, store: str, options: ServeOptions, folder: str, *, on_gpu: bool) -> None:
        start_logging()
        stand_in(folder)
        if not on_gpu:
            torch.set_num_threads(max(1, int(options.cpus_per_replica)))
        device = torch.device("cuda" if on_gpu else "cpu")
        self._gallery = Gallery(open_storage(store), options, device)
        # One thread is the lock: the adapter that is set belongs to the picture being drawn.
        self._hand = ThreadPoolExecutor(max_workers=1)

    async def render(
        self, request: RenderRequest, run: str, checkpoint: Checkpoint | None
    ) -> Picture | Refusal:
        """Draw a request; one whose client left while it waited is skipped."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._hand, self._render, request, run, checkpoint)

    def _render(
        self, request: RenderRequest, run: str, checkpoint: Checkpoint | None
    ) -> Picture | Refusal:
        try:
            return self._gallery.draw(request, run, checkpoint)
        except UserError as error:
            return Refusal.of(error)
