"""diffusers' own pipelines around the models at hand, and pictures drawn with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylora.diffusion.process import AnyProcess
from raylora.diffusion.samplers import DrawNoise, Sampler, make_sampler
from raylora.weights.base import Base

Conditions = dict[str, Tensor]


def base_scheduler(base: Base) -> Any:
    """The scheduler that the base comes with; DDIM where diffusers has no such class any more."""
    import diffusers

    config = base.config("scheduler")
    made = getattr(diffusers, str(config.get("_class_name")), diffusers.DDIMScheduler)
    return made.from_config(config)


class UnetRenderer:
    """Stable Diffusion's pipelines with the base's own scheduler config and our text.

    Args:
        pipeline: StableDiffusionPipeline or StableDiffusionXLPipeline. A VAE of another dtype than
            the UNet's decodes in its own.
        read: the conditions of one prompt.
    """

    def __init__(self, pipeline: Any, read: Callable[[str], Conditions]) -> None:
        self._pipeline = pipeline
        self._read = read
        pipeline.set_progress_bar_config(disable=True)
        # As the pipeline leaves it: configs of old bases are mended there. Latents have no bounds
        # to be clipped to, whatever a scheduler takes for granted that was made for pixels.
        self._scheduler_config = {**pipeline.scheduler.config, "clip_sample": False}

    def render(
        self,
        prompt: str,
        *,
        negative: str,
        latents: Tensor,
        steps: int,
        guidance: float,
        sampler: Sampler = "ddim",
        noise: DrawNoise | None = None,
        process: AnyProcess | None = None,
        embedded_guidance: float | None = None,
    ) -> NDArray[np.uint8]:
        """A picture (H, W, 3)."""
        assert embedded_guidance is None, "these UNets are told no guidance"
        pipeline = self._pipeline
        dtype, device = pipeline.unet.dtype, pipeline.unet.device
        factor = pipeline.vae_scale_factor
        pipeline.scheduler = make_sampler(
            sampler, self._scheduler_config, process=process, noise=noise
        )
        whole = pipeline.vae.dtype == dtype
        with torch.no_grad():
            # One at a time, as the pipeline does: a batch of two sums in another order.
            wanted, unwanted = self._read(prompt), self._read(negative)
            drawn = pipeline(
                **_embeddings(wanted, ""),
                **_embeddings(unwanted, "negative_"),
                height=latents.shape[2] * factor,
                width=latents.shape[3] * factor,
                latents=latents.to(dtype=dtype, device=device),
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="np" if whole else "latent",
            ).images
            picture = drawn[0] if whole else _decode(pipeline, drawn)
        return np.asarray((picture * 255).round().clip(0, 255), dtype=np.uint8)


def _embeddings(conditions: Conditions, prefix: str) -> dict[str, Tensor]:
    words = {f"{prefix}prompt_embeds": conditions["text"]}
    if "pooled" in conditions:
        words[f"{prefix}pooled_prompt_embeds"] = conditions["pooled"]
    return words


def _decode(pipeline: Any, latents: Tensor) -> Any:
    """(H, W, 3) float32 in 0..1, decoded in the VAE's dtype."""
    vae = pipeline.vae
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor
    decoded = vae.decode(scaled, return_dict=False)[0]
    return pipeline.image_processor.postprocess(decoded, output_type="np")[0]
