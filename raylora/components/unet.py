"""The UNets of Stable Diffusion 1.x, 2.x and XL: loaded from a base, and what their layers are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from raylora.base.errors import WeightsError
from raylora.base.site import Role, Site
from raylora.base.unit import Unit
from raylora.components.sites import expect_layers, site_of
from raylora.diffusion.attention import attention
from raylora.diffusion.process import Prediction, Process
from raylora.diffusion.schedules import alphas_cumprod
from raylora.weights.base import Base
from raylora.weights.fill import fill

_BLOCK = re.compile(
    r"(?P<section>down|mid|up)_block(?:s\.(?P<number>\d+))?\."
    r"(?P<part>attentions|resnets|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)"
)
_LINEARS_A_BLOCK = 10  # two attentions of four, two of the MLP


def unet_config(base: Base, *, kind: str) -> dict[str, Any]:
    """The UNet's config.

    Args:
        kind: the family, for the sentence.

    Raises:
        WeightsError: it is another denoiser's.
    """
    config = base.config("unet")
    found = config.get("_class_name", "UNet2DConditionModel")
    if found != "UNet2DConditionModel":
        raise WeightsError(
            f"{base.name}: its unet is a {found}, {kind} needs a UNet2DConditionModel. Choose the "
            "family that fits the weights."
        )
    return config


def check_stable_diffusion(base: Base, config: Mapping[str, Any], *, linear: bool) -> None:
    """Refuse a UNet that is neither Stable Diffusion 1.x's nor 2.x's, or the other of the two.

    Args:
        config: of `unet_config`.
        linear: 2.x, whose way into and out of the transformers is linear; 1.x has 1x1 convolutions.

    Raises:
        WeightsError: it is another model's.
    """
    if config.get("addition_embed_type"):
        raise WeightsError(
            f"{base.name}: its unet's config has addition_embed_type "
            f"{config['addition_embed_type']!r}: this is not Stable Diffusion 1.x or 2.x. Choose "
            "the family that fits the weights."
        )
    if bool(config.get("use_linear_projection")) != linear:
        found, kind = ("1.x", "sd15") if linear else ("2.x", "sd2")
        raise WeightsError(
            f"{base.name}: its unet's config has use_linear_projection {str(not linear).lower()}, "
            f"as Stable Diffusion {found} has it. Set family.kind to {kind}."
        )


def check_widths(base: Base, config: Mapping[str, Any], *, channels: int, text: int) -> None:
    """Refuse a VAE or text encoders that the UNet was not made for.

    Args:
        config: of `unet_config`.
        channels: of the VAE's latents.
        text: how wide the text encoders' states are, side by side.

    Raises:
        WeightsError: they do not fit.
    """
    takes = int(config.get("in_channels", 4))
    if takes > int(config.get("out_channels", 4)):
        raise WeightsError(
            f"{base.name}: its unet reads {takes} channels: this is an inpainting or editing "
            "model, which raylora does not train. Give the model that it was made from."
        )
    if takes != channels:
        raise WeightsError(
            f"{base.name}: its unet reads latents of {takes} channels, and the VAE makes "
            f"{channels}: it is another family's. Set family.vae to one that belongs to it, or "
            "leave family.vae out."
        )
    reads = config.get("cross_attention_dim", text)
    if isinstance(reads, int) and reads != text:
        raise WeightsError(
            f"{base.name}: its unet reads text {reads} wide, and the text encoders give {text}. "
            "Give those that belong to it in family.parts, or leave family.parts out."
        )


def scheduler_process(base: Base, *, kind: str) -> Process:
    """How the base was trained, from its scheduler's config.

    Raises:
        WeightsError: in a way that raylora does not know.
    """
    config = base.config("scheduler")
    prediction: Prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise WeightsError(
            f"{base.name}: its scheduler's config has prediction_type {prediction!r}; {kind} knows "
            "epsilon and v_prediction."
        )
    return Process(prediction, alphas_cumprod(config))


def empty_unet(base: Base) -> nn.Module:
    """The UNet on the meta device, from its config."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        unet: nn.Module = UNet2DConditionModel.from_config(base.config("unet"))
    return unet.requires_grad_(False).eval()


def load_unet(
    base: Base, *, dtype: torch.dtype, device: torch.device, plain: bool = False
) -> nn.Module:
    """The frozen UNet, built empty and filled from the base's weights.

    Args:
        plain: with diffusers' own attention, for comparisons; ours is the same and faster.
    """
    unet = fill(empty_unet(base), base.weights("unet"), dtype=dtype, device=device)
    if not plain:
        _with_our_attention(unet)
    return unet.requires_grad_(False).eval()


def _with_our_attention(unet: nn.Module) -> None:
    from diffusers.models.attention_processor import Attention

    for layer in unet.modules():
        if isinstance(layer, Attention):
            layer.forward = MethodType(_attend, layer)


def _attend(
    layer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: None = None,
) -> Tensor:
    """An attention layer's forward, without the options of diffusers' that these UNets have not."""
    others = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = layer.to_q(hidden_states), layer.to_k(others), layer.to_v(others)
    projected: Tensor = layer.to_out[0](attention(query, key, value, heads=layer.heads))
    return projected


def unet_sites(unet: nn.Module, block_of: Callable[[str], int | None]) -> list[Site]:
    """Every layer that an adapter can sit on, in the order of the model.

    Args:
        block_of: the block of a path, as block-wise rates count them.

    Raises:
        WeightsError: there are not as many as the config means.
    """
    found = []
    for path, module in unet.named_modules():
        role, section, number = _kind_of(path)
        site = site_of(f"unet.{path}", module, role=role, section=section, number=number)
        found += [replace(site, block=block_of(path))] if site else []
    config: Any = unet.config
    held = [site.role for site in found]
    inner = sum(held.count(role) for role in ("attention", "mlp", "projection"))
    expect_layers("UNet", inner, transformer_layers(config))
    residual = held.count("residual")
    expect_layers("UNet", inner + residual, inner + residual_layers(config))
    return found


def _kind_of(path: str) -> tuple[Role, str, int]:
    """What a layer at a path of diffusers' UNet does, its stretch, and its block there."""
    found = _BLOCK.match(path)
    if found is None:
        return "embedder", "", 0
    section, number = found["section"], int(found["number"] or 0)
    if found["part"] != "attentions":
        return "residual", section, number
    if ".attn" in found["rest"]:
        return "attention", section, number
    return ("mlp" if ".ff." in found["rest"] else "projection"), section, number


def transformer_layers(config: Mapping[str, Any]) -> int:
    """Linears and 1x1 convolutions in a UNet's transformers: SD 1.x and 2.x 192, SDXL 722."""
    down, up = config["down_block_types"], config["up_block_types"]
    depths = _depths(config)
    deep = int(config["layers_per_block"])
    transformers = [depths[-1]]
    for block, depth in zip(down, depths, strict=True):
        transformers += [depth] * deep if "CrossAttn" in block else []
    for block, depth in zip(up, reversed(depths), strict=True):
        transformers += [depth] * (deep + 1) if "CrossAttn" in block else []
    return sum(2 + _LINEARS_A_BLOCK * depth for depth in transformers)


def _depths(config: Mapping[str, Any]) -> list[int]:
    """Blocks within each transformer, by level."""
    found = config.get("transformer_layers_per_block", 1)
    levels = len(config["down_block_types"])
    return [found] * levels if isinstance(found, int) else list(found)


def residual_layers(config: Mapping[str, Any]) -> int:
    """Layers of the residual blocks and the samplers; 86 in SD 1.x and 2.x."""
    deep, channels = int(config["layers_per_block"]), config["block_out_channels"]
    levels = len(channels)
    residual = levels * deep + 2 + levels * (deep + 1)
    widened = sum(before != after for before, after in pairwise((channels[0], *channels)))
    shortcuts = widened + levels * (deep + 1)  # on the way up all are joined with another
    samplers = 2 * (levels - 1)
    return int(3 * residual + shortcuts + samplers)


def sd_block(path: str) -> int | None:
    """sd-scripts' count of SD 1.x's and 2.x's blocks: 1-11 down, 12, 13-24 up."""
    found = _BLOCK.match(path)
    if found is None:
        return None
    if found["section"] == "mid":
        return 12
    within = 2 if found["part"].endswith("samplers") else int(found["index"])
    return (1 if found["section"] == "down" else 13) + 3 * int(found["number"]) + within


_SGM_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_SGM_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def sgm_path(path: str, *, deep: int, attended: Sequence[bool]) -> str:
    """Where SDXL's makers keep a layer of diffusers' UNet: `input_blocks.4.1.proj_in`, …

    Args:
        path: in diffusers' UNet, without the component.
        deep: the config's `layers_per_block`.
        attended: whether each block on the way up has attention.
    """
    if path in _SGM_ENDS:
        return _SGM_ENDS[path]
    found = _BLOCK.match(path)
    assert found is not None, path
    index, rest, part = int(found["index"]), found["rest"], found["part"]
    if part == "resnets":
        rest = _SGM_RESIDUAL[rest]
    if found["section"] == "mid":
        return f"middle_block.{2 * index if part == 'resnets' else 1}.{rest}"
    first = (deep + 1) * int(found["number"])
    if found["section"] == "down":
        if part == "downsamplers":
            return f"input_blocks.{first + deep + 1}.0.op"
        return f"input_blocks.{first + index + 1}.{int(part == 'attentions')}.{rest}"
    if part == "upsamplers":
        behind = 2 if attended[int(found["number"])] else 1
        return f"output_blocks.{first + deep}.{behind}.{rest}"
    return f"output_blocks.{first + index}.{int(part == 'attentions')}.{rest}"


def sgm_block(path: str) -> int | None:
    """sd-scripts' count of SDXL's blocks, from the makers' path.

    0 is the embedding of time and size, 1-9 are the inputs, 10-12 the middle, 13-21 the outputs
    and 22 is the end.
    """
    first, _, rest = path.partition(".")
    number = int(rest.partition(".")[0]) if rest else 0
    starts = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}
    if first in starts:
        return starts[first] + number
    return {"time_embed": 0, "label_emb": 0, "out": 22}.get(first)


def unet_units(unet: nn.Module) -> list[Unit]:
    """Residual blocks and transformer blocks, in the order in which they run."""
    model: Any = unet
    blocks = [(f"down_blocks.{i}", block) for i, block in enumerate(model.down_blocks)]
    blocks.append(("mid_block", model.mid_block))
    blocks += [(f"up_blocks.{i}", block) for i, block in enumerate(model.up_blocks)]
    found = []
    for path, block in blocks:
        transformers = list(getattr(block, "attentions", ()))
        for number, residual in enumerate(block.resnets):
            found.append(Unit(f"unet.{path}.resnets.{number}", residual))
            for transformer in transformers[number : number + 1]:
                found += [
                    Unit(f"unet.{path}.attentions.{number}.transformer_blocks.{i}", one, (one.ff,))
                    for i, one in enumerate(transformer.transformer_blocks)
                ]
    return found
