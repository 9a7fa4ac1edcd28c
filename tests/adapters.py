"""Random adapters and empty base models, for tests of LoRA files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from raylora.adapt.attach import Adapter, first_weights, weights_in
from raylora.adapt.keys import Naming
from raylora.adapt.layout import _in_diffusers_words, laid_out
from raylora.adapt.lora_file import ALPHA, DOWN, UP, AdapterModule, adapter_bytes
from raylora.adapt.onto import Names
from raylora.adapt.trained import Trained
from raylora.base.site import Place, Site
from raylora.networks import Network, NetworkOptions

TINY_BASE = Path(__file__).parents[1] / "jobs" / "quickstart" / "tiny-sd"
GOLDEN = Path(__file__).parent / "golden" / "lora_file"
SD15_MODULES: dict[str, Any] = json.loads((GOLDEN / "sd15_modules.json").read_text())
"""Network of sd-scripts -> module as files name it -> [shape of down, shape of up, alpha]."""
ATTENTION = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
SHAPES: dict[str, tuple[int, ...]] = {
    f"{ATTENTION}.to_q": (64, 64),
    f"{ATTENTION}.to_k": (64, 64),
    f"{ATTENTION}.to_out.0": (64, 64),
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": (512, 64),
    "unet.down_blocks.1.attentions.0.proj_in": (64, 64, 1, 1),
    "unet.mid_block.resnets.0.conv1": (96, 96, 3, 3),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (96, 96),
    "text_encoder.text_model.encoder.layers.0.self_attn.out_proj": (96, 96),
    "text_encoder.text_model.encoder.layers.1.mlp.fc1": (192, 96),
}
"""A few layers of the tiny base, one of each kind, with the shape of their weights."""


def random_module(
    name: str, weight_shape: Sequence[int], *, rank: int = 4, alpha: float = 2.0, seed: int = 0
) -> AdapterModule:
    """A module with normal random halves of size 0.1."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs, *kernel = weight_shape
    down = torch.randn(rank, inputs, *kernel, generator=generator) * 0.1
    up = torch.randn(outputs, rank, *[1 for _ in kernel], generator=generator) * 0.1
    return AdapterModule(name, {DOWN: down, UP: up, ALPHA: torch.tensor(alpha)})


def random_adapter(
    shapes: Mapping[str, Sequence[int]] | None = None, *, rank: int = 4, alpha: float = 2.0
) -> list[AdapterModule]:
    """One random module for each layer."""
    return [
        random_module(name, shape, rank=rank, alpha=alpha, seed=seed)
        for seed, (name, shape) in enumerate((shapes or SHAPES).items())
    ]


def sd15_place(name: str) -> Place:
    """Where kohya's files keep a layer of Stable Diffusion 1.x, by the name of its site."""
    component, _, path = name.partition(".")
    return Place({"unet": "lora_unet", "text_encoder": "lora_te"}[component], path)


SD15 = Names("sd15", sd15_place, {})


def kohya_name(name: str) -> str:
    """A layer of Stable Diffusion 1.x in kohya's files."""
    return sd15_place(name).kohya


def file_bytes(
    modules: Sequence[AdapterModule],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    names: Names = SD15,
    naming: Naming = "kohya",
) -> bytes:
    """A LoRA file as a run saves it, of modules named by sites."""
    return adapter_bytes(laid_out(modules, names, naming), metadata or {}, dtype=dtype)


def raw_bytes(
    modules: Sequence[AdapterModule],
    naming: Naming = "kohya",
    *,
    dtype: torch.dtype = torch.float32,
) -> bytes:
    """A file without what makes it readable for diffusers."""
    if naming == "kohya":
        named = [AdapterModule(kohya_name(one.name), one.tensors) for one in modules]
    else:
        named = [_in_diffusers_words(one) for one in modules]
    return adapter_bytes(named, {}, dtype=dtype)


def site_of_module(module: AdapterModule) -> Site:
    """The layer that a low-rank module is for."""
    down, up = module.tensors[DOWN], module.tensors[UP]
    kernel = (*down.shape[2:], 1, 1)[:2]
    kind: Literal["linear", "conv"] = "conv" if down.dim() == 4 else "linear"
    return Site(module.name, kind, down.shape[1], up.shape[0], kernel=kernel)


def as_trained(modules: Sequence[AdapterModule]) -> Trained:
    """What a trainer hands to the proof."""
    sites = [site_of_module(module) for module in modules]
    parameters = {}
    for module, site in zip(modules, sites, strict=True):
        down, up, _ = module.low_rank
        parameters[module.name] = {
            "down": down.flatten(1) if site.kernel == (1, 1) else down,
            "up": up.flatten(1),
        }
    scales = {module.name: module.low_rank[2] for module in modules}
    return Trained("lora", sites, parameters, scales)


# The values with which Stable Diffusion 1.5 is built (diffusers' and transformers' words).
SD15_UNET = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 64,
}
SD15_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
}


@cache
def sd15_components() -> dict[str, nn.Module]:
    """UNet and text encoder of Stable Diffusion 1.5 in full size, without memory for weights."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(**SD15_UNET),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**SD15_TEXT)),
        }


def fresh_adapter(
    network: Network,
    options: NetworkOptions,
    sites: Sequence[Site],
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    models: Mapping[str, nn.Module] | None = None,
) -> Adapter:
    """A new adapter; each site's first weights come from its own name and the seed.

    `models` are by component, for networks that begin from the frozen weights.
    """
    weight_of = weights_in(models) if models else None
    initial = first_weights(network, options, sites, seed=seed, weight_of=weight_of)
    scales = {site.name: options.scale_at(site) for site in sites}
    constants = {site.name: network.constants(options, site) for site in sites}
    return Adapter(network, sites, initial, scales, dtype=dtype, device=device, constants=constants)
