"""What the diffusion transformers of SD 3 and FLUX share: loading, layers, pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylora.base.errors import WeightsError
from raylora.base.site import Place, Role, Site
from raylora.base.unit import Unit
from raylora.components.pipelines import as_picture
from raylora.components.sites import expect_layers, site_of
from raylora.components.texts import Conditions, Prompts
from raylora.components.vae import Decoder
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


def dit_units(transformer: nn.Module) -> list[Unit]:
    """The blocks in the order in which they run: single ones behind the others."""
    found = []
    for word in ("transformer_blocks", "single_transformer_blocks"):
        for number, block in enumerate(getattr(transformer, word, ())):
            parts = (getattr(block, part, None) for part in ("ff", "ff_context"))
            mlp = tuple(part for part in parts if part is not None)
            found.append(Unit(f"transformer.{word}.{number}", block, mlp))
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
        pipeline: StableDiffusion3Pipeline or FluxPipeline, with a transformer alone.
        prompts: what the transformer is told of them.
        decoder: latents to pixels.
        words: the pipeline's own arguments of what is asked.
        dtype, device: of the transformer's activations, however and wherever its weights lie.
        around: within it the pipeline is called with these conditions.
        latents_of: what the pipeline gives, height and width -> latents.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Prompts,
        decoder: Decoder,
        words: Callable[[Asked], dict[str, Any]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        around: Callable[[list[Conditions]], AbstractContextManager[None]] = lambda told: (
            nullcontext()
        ),
        latents_of: Callable[[Tensor, int, int], Tensor] = lambda given, height, width: given,
    ) -> None:
        self._pipeline, self._prompts, self._decoder = pipeline, prompts, decoder
        self._words, self._around, self._latents_of = words, around, latents_of
        self._dtype, self._device = dtype, device
        pipeline.set_progress_bar_config(disable=True)
        self._scheduler_config = dict(pipeline.scheduler.config)

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
        sampler: Sampler = "euler",
        noise: DrawNoise | None = None,
        process: AnyProcess | None = None,
        embedded_guidance: float | None = None,
    ) -> NDArray[np.uint8]:
        """A picture (H, W, 3)."""
        pipeline, (height, width) = self._pipeline, latents.shape[2:]
        factor = pipeline.vae_scale_factor
        pipeline.scheduler = make_sampler(
            sampler, self._scheduler_config, process=process or Flow(), noise=noise
        )
        asked = Asked(
            latents.to(dtype=self._dtype, device=self._device), guidance, embedded_guidance
        )
        prompts = [prompt, negative] if guidance > 1 else [prompt]
        self._prompts.read(prompts)
        told = [self._prompts.of(one) for one in prompts]
        embeddings: dict[str, Tensor] = {}
        for one, prefix in zip(told, ("", "negative_"), strict=False):
            embeddings |= _embeddings(one, prefix)
        with self._around(told):
            drawn = pipeline(
                **embeddings,
                **self._words(asked),
                height=height * factor,
                width=width * factor,
                num_inference_steps=steps,
                output_type="latent",
            ).images
        return as_picture(pipeline, self._decoder.decode(self._latents_of(drawn, height, width)))


def _embeddings(conditions: Conditions, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}prompt_embeds": conditions["text"],
        f"{prefix}pooled_prompt_embeds": conditions["pooled"],
    }
