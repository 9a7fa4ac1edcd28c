"""diffusers' own pipelines around the models at hand, and pictures drawn with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylora.components.texts import Conditions, Prompts
from raylora.components.vae import Decoder
from raylora.diffusion.process import AnyProcess
from raylora.diffusion.samplers import DrawNoise, Sampler, make_sampler
from raylora.weights.base import Base


def base_scheduler(base: Base) -> Any:
    """The scheduler that the base comes with; DDIM where diffusers has no such class any more."""
    import diffusers

    config = base.config("scheduler")
    made = getattr(diffusers, str(config.get("_class_name")), diffusers.DDIMScheduler)
    return made.from_config(config)


class UnetRenderer:
    """Stable Diffusion's pipelines with the base's own scheduler config and our text.

    Args:
        pipeline: StableDiffusionPipeline or StableDiffusionXLPipeline, with a denoiser alone.
        prompts: what the denoiser is told of them.
        decoder: latents to pixels.
        dtype: of the denoiser's activations; its weights may be held in another.
        device: where it computes; its weights may lie elsewhere.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Prompts,
        decoder: Decoder,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._pipeline, self._prompts, self._decoder = pipeline, prompts, decoder
        self._dtype, self._device = dtype, device
        pipeline.set_progress_bar_config(disable=True)
        # As the pipeline leaves it: configs of old bases are mended there. Latents have no bounds
        # to be clipped to, whatever a scheduler takes for granted that was made for pixels.
        self._scheduler_config = {**pipeline.scheduler.config, "clip_sample": False}

    def read(self, prompts: Sequence[str]) -> None:
        """Read prompts ahead."""
        self._prompts.read(prompts)

    @torch.no_grad()
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
        factor = pipeline.vae_scale_factor
        pipeline.scheduler = make_sampler(
            sampler, self._scheduler_config, process=process, noise=noise
        )
        prompts = [prompt, negative] if guidance > 1 else [prompt]
        self._prompts.read(prompts)
        embeddings: dict[str, Tensor] = {}
        for one, prefix in zip(prompts, ("", "negative_"), strict=False):
            embeddings |= _embeddings(self._prompts.of(one), prefix)
        drawn = pipeline(
            **embeddings,
            height=latents.shape[2] * factor,
            width=latents.shape[3] * factor,
            latents=latents.to(dtype=self._dtype, device=self._device),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images
        return as_picture(pipeline, self._decoder.decode(drawn))


def as_picture(pipeline: Any, decoded: Tensor) -> NDArray[np.uint8]:
    """(H, W, 3) of the first of what a VAE gave."""
    picture = pipeline.image_processor.postprocess(decoded, output_type="np")[0]
    return np.asarray((picture * 255).round().clip(0, 255), dtype=np.uint8)


def _embeddings(conditions: Conditions, prefix: str) -> dict[str, Tensor]:
    words = {f"{prefix}prompt_embeds": conditions["text"]}
    if "pooled" in conditions:
        words[f"{prefix}pooled_prompt_embeds"] = conditions["pooled"]
    return words
