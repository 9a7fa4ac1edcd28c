"""Whole predictions with the first file that a run saves, against those of the adapter in training.

The proof of export compares module by module. This is the other half: what was read back is put
where the adapter is, and both must move the whole model alike. Once, since a layout that is right
is right for every later file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raylora.adapt.attach import Adapter
from raylora.base.errors import ExportError
from raylora.base.seeds import draw_normal
from raylora.data.supply import DROPPED
from raylora.diffusion.process import Flow
from raylora.training.loader import micro_batches
from raylora.training.parts import Parts
from raylora.training.step import predict_at

FileAdapter = Callable[[bytes], Adapter]
"""A LoRA file -> the adapter that it is, on this run's layers."""

# On the tiny bases honest files were 0 to 0.9 of the nudge apart, in float32, float16 and bfloat16.
_NUDGES = 3
_LEAST = 1e-6
# Both halves are rounded, and their product may be smaller than they are.
_OF_EFFECT = 8


@dataclass(frozen=True)
class FirstLook:
    """How predictions with the file compare.

    Attributes:
        difference: ‖with the file - with the adapter‖ / ‖with the adapter‖.
        effect: ‖with the adapter - of the base‖ / ‖with the adapter‖.
        limit: what rounding explains of the difference.
    """

    difference: float
    effect: float
    limit: float


def look_at(
    parts: Parts, file: bytes, adapter_of: FileAdapter, *, file_dtype: torch.dtype
) -> FirstLook | None:
    """Predict one training sample with the adapter, with the file, and with neither.

    How far apart rounding alone brings two predictions is no constant: in bfloat16 it grows with
    the depth of the base. So it is measured: the base predicts twice, the second time from latents
    of which every other number is one rounding off.

    Returns:
        None where there is nothing to compare: the adapter's own prediction is zero or not finite,
        which is no fault of the file.

    Raises:
        ExportError: the file predicts something else than the adapter.
    """
    with torch.no_grad():
        ours = _predict(parts)
        size = float(ours.norm())
        if not 0 < size < math.inf:
            return None
        with _in_place(parts, adapter_of(file)):
            theirs = _predict(parts)
        with parts.adapter.off():
            base, nudged = _predict(parts), _predict(parts, nudge=True)
    effect = float((ours - base).norm()) / size
    rounding = max(_LEAST, _NUDGES * float((nudged - base).norm()) / size)
    found = FirstLook(
        difference=float((theirs - ours).norm()) / size,
        effect=effect,
        limit=rounding + _OF_EFFECT * torch.finfo(file_dtype).eps / 2 * effect,
    )
    if not found.difference <= found.limit:
        raise ExportError(
            "The saved file predicts otherwise than the adapter in training: the difference is "
            f"{found.difference:.1e} of the prediction, and rounding explains {found.limit:.0e}."
        )
    return found


def _predict(parts: Parts, *, nudge: bool = False) -> Tensor:
    """The prediction for the run's first sample at the middle timestep, float64.

    No text encoder's part is left out, so that what it learned is looked at.
    """
    samples = parts.loader.plan.samples(0)[:1]
    ((_, batch),) = micro_batches(samples, parts.loader.fetch(samples), 1)
    latents = batch["latents"].to(parts.device, parts.adapter.values.dtype)
    shape = tuple(latents.shape[1:])
    drawn = draw_normal(shape, seed=0, step=0, sample=samples[0].number, purpose="validation")
    noise = torch.from_numpy(np.asarray(drawn))[None].to(latents)
    middle = torch.tensor([parts.process.steps // 2], device=parts.device)
    timesteps = middle.float() if isinstance(parts.process, Flow) else middle
    noisy = parts.process.noisy(latents, noise, timesteps).to(parts.dtype)
    if nudge:
        noisy.view(-1)[::2] *= 1 + torch.finfo(parts.dtype).eps
    if DROPPED in batch:
        batch[DROPPED] = torch.zeros_like(batch[DROPPED])
    return predict_at(parts, batch, noisy, timesteps).double()


@contextmanager
def _in_place(parts: Parts, adapter: Adapter) -> Iterator[None]:
    """Within it, another adapter is where the trained one was."""
    before = [attachment.adapter for attachment in parts.attachments]
    for attachment in parts.attachments:
        attachment.adapter = adapter
    try:
        yield
    finally:
        for attachment, own in zip(parts.attachments, before, strict=True):
            attachment.adapter = own
