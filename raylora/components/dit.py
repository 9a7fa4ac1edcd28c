"""What the diffusion transformers of SD 3 and FLUX share: loading, layers, pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylora.base.errors import WeightsError
from raylora.base.site import Place, Role, Site
from raylora.components.pipelines import Conditions
from raylora.components.sites import expect_layers, site_of
from raylora.diffusion.process import AnyProcess, Flow
from raylora.diffusion.samplers import DrawNoise, Sampler, make_sampler
from raylora.weights.base import Base
from raylora.weights.fill import fill

PATCH = 2
"""Side in latents of what is one token of the transformer."""
_BLOCK = re.compile(r"(?P<single>single_)?transformer_blocks\.(?P<number>\d+)\.(?P<rest>.+)")
_LINEARS_A_BLOCK = 14  # eight of the attention, two of each MLP, two of the modulation


def dit_config(base: Base, *, kind: str, name: str) -> dict[str, Any]:
    """The transformer's config.

    Args:
        kind: the family, for the sentence.
        name: the class in diffusers that it must be of.

    Raises:
        WeightsError: it is another denoiser's.
    """
    config = base.config("transformer")
    found = config.get("_class_name", name)
    if found != name:
        raise WeightsError(
            f"{base.name}: its transformer is a {found}, {kind} needs a {name}. Choose the family "
            "that fits the weights."
        )
    return config


def empty_dit(base: Base, name: str) -> nn.Module:
    """A transformer on the meta device, from its config, of a class in diffusers."""
    import diffusers

    with torch.device("meta"):
        made: nn.Module = getattr(diffusers, name).from_config(base.config("transformer"))
    return made.requires_grad_(False).eval()


def load_dit(base: Base, name: str, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen transformer, filled from the base's weights."""
    filled = fill(empty_dit(base, name), base.weights("transformer"), dtype=dtype, device=device)
    return filled.requires_grad_(False).eval()


@dataclass(frozen=True)
class Unrounded:
    """Timesteps or guidance that a transformer of diffusers gets as they are.

    It would round them to its own dtype before it embeds them, and bf16 keeps 8 bits: near 900 the
    timesteps of it lie 4 apart. What is embedded is float32 in any case.
    """

    value: Tensor

    def to(self, dtype: torch.dtype) -> Tensor:
        """The value in its own dtype, whatever is asked for."""
        return self.value


class About(NamedTuple):
    """Where a layer of a transformer is."""

    section: str
    number: int
    rest: str
    """Its path within the block; the whole path outside of blocks."""


def about_layer(path: str, *, section: str) -> About:
    """Where a layer at a path of diffusers' transformer is.

    Args:
        section: the family's word for blocks that are not single ones.
    """
    found = _BLOCK.fullmatch(path)
    if found is None:
        return About("", 0, path)
    return About("single" if found["single"] else section, int(found["number"]), found["rest"])


def dit_sites(transformer: nn.Module, *, section: str, doubles: int) -> list[Site]:
    """Every layer that an adapter can sit on, in the order of the model.

    Args:
        section: the family's word for blocks that are not single ones.
        doubles: how many of these there are; single ones are counted on from them.

    Raises:
        WeightsError: there are not as many as the config means.
    """
    found = []
    for path, module in transformer.named_modules():
        about = about_layer(path, section=section)
        block = None
        if about.section:
            block = about.number + (doubles if about.section == "single" else 0)
        site = site_of(
            f"transformer.{path}",
            module,
            role=_role(about),
            section=about.section,
            number=about.number,
            block=block,
        )
        found += [site] if site else []
    linears = sum(site.kind == "linear" and site.section != "" for site in found)
    expect_layers("transformer", linears, block_linears(transformer.config))  # type: ignore[arg-type]
    return found


def _role(about: About) -> Role:
    if not about.section:
        return "embedder"
    if about.rest.startswith("attn"):
        return "attention"
    # The way out of a single block takes what its attention and its MLP give, side by side.
    return "mlp" if about.rest.startswith(("ff", "proj_")) else "modulation"


def block_linears(config: Mapping[str, Any]) -> int:
    """Linears within the blocks that a config means: FLUX 494, SD 3 medium 333."""
    doubles = _LINEARS_A_BLOCK * int(config["num_layers"])
    if "num_single_layers" in config:
        return doubles + 6 * int(config["num_single_layers"])
    # Nothing reads the text behind the last block: no way out of its attention, and no MLP.
    return doubles - 3 + 4 * len(config.get("dual_attention_layers") or ())


def part_of_joined(path: str, layer: int, widths: tuple[int, ...]) -> Place:
    """A layer's place among several that its makers joined in one.

    Args:
        layer: which of them it is.
        widths: outputs of each.
    """
    first = sum(widths[:layer])
    return Place("lora_unet", path, (first, first + widths[layer], sum(widths)))


# -- pictures


@dataclass(frozen=True)
class Asked:
    """What one picture is asked to be, beside its prompts.

    Attributes:
        latents: (1, C, h, w) standard normal, in the transformer's dtype and on its device.
        guidance: classifier-free; 1 and less is none.
        embedded: guidance that the transformer is told; None is its usual.
    """

    latents: Tensor
    guidance: float
    embedded: float | None


class FlowRenderer:
    """diffusers' own pipeline for flow models with our text.

    Args:
        pipeline: StableDiffusion3Pipeline or FluxPipeline.
        read: the conditions of one prompt.
        words: the pipeline's own arguments of what is asked.
        around: within it the pipeline is called with these conditions.
    """

    def __init__(
        self,
        pipeline: Any,
        read: Callable[[str], Conditions],
        words: Callable[[Asked], dict[str, Any]],
        around: Callable[[list[Conditions]], AbstractContextManager[None]] = lambda told: (
            nullcontext()
        ),
    ) -> None:
        self._pipeline = pipeline
        self._read, self._words, self._around = read, words, around
        pipeline.set_progress_bar_config(disable=True)
        self._scheduler_config = dict(pipeline.scheduler.config)

    def render(
        self,
        prompt: str,
        *,
        negative: str,
        latents: Tensor,
        steps: int,
        guidance: float,
        sampler: Sampler = "euler",
        noise: DrawNoise | None = None,
        process: AnyProcess | None = None,
        embedded_guidance: float | None = None,
    ) -> NDArray[np.uint8]:
        """A picture (H, W, 3)."""
        pipeline = self._pipeline
        dtype, device = pipeline.transformer.dtype, pipeline.transformer.device
        factor = pipeline.vae_scale_factor
        pipeline.scheduler = make_sampler(
            sampler, self._scheduler_config, process=process or Flow(), noise=noise
        )
        asked = Asked(latents.to(dtype=dtype, device=device), guidance, embedded_guidance)
        with torch.no_grad():
            told = [self._read(prompt)]
            embeddings = _embeddings(told[0], "")
            if guidance > 1:
                told.append(self._read(negative))
                embeddings |= _embeddings(told[1], "negative_")
            with self._around(told):
                drawn = pipeline(
                    **embeddings,
                    **self._words(asked),
                    height=latents.shape[2] * factor,
                    width=latents.shape[3] * factor,
                    num_inference_steps=steps,
                    output_type="np",
                ).images[0]
        return np.asarray((drawn * 255).round().clip(0, 255), dtype=np.uint8)


def _embeddings(conditions: Conditions, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}prompt_embeds": conditions["text"],
        f"{prefix}pooled_prompt_embeds": conditions["pooled"],
    }
