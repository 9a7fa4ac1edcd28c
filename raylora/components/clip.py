"""CLIP text encoders: loaded from a base, their layers, and what a denoiser is given of captions.

A layer's name always has the level `text_model.` behind the component, as LoRA files have it;
the model tree of transformers 5 has that level only in models with a projection.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from raylora.base.errors import WeightsError
from raylora.base.options import Options
from raylora.base.site import Place, Role, Site
from raylora.base.unit import Unit
from raylora.components.sites import expect_layers, site_of
from raylora.diffusion.clip_text import Chunks, join_chunks
from raylora.weights.base import Base
from raylora.weights.fill import fill

LEVEL = "text_model."
"""What every name of a layer begins with, behind its component."""
MaxTokens = Literal[75, 150, 225]


class ClipTextOptions(Options):
    """How captions are read where CLIP's hidden states are all that the denoiser gets of them."""

    max_tokens: MaxTokens = 75
    """Tokens of a caption that are read: 75, 150 or 225. What is longer is cut off. Above 75, CLIP
    reads the caption in chunks of 75. Previews use the same."""
    weighted_captions: bool = False
    """Read weights in captions and in prompts of previews: (x) is 1.1 times as strong, (x:1.3) 1.3
    times, [x] 1.1 times weaker. Off, such brackets are text."""


class Read(NamedTuple):
    """What an encoder says of B captions."""

    hidden_BTD: Tensor
    """(B, 75 N + 2, D): hidden states of all chunks, weighted and joined."""
    pooled_BD: Tensor
    """(B, D): the first chunk at its last token, projected where the model has a projection."""


def check_clip_skip(base: Base, clip_skip: int) -> None:
    """Refuse to skip more layers than the text encoder has (WeightsError)."""
    layers = int(base.config("text_encoder")["num_hidden_layers"])
    if clip_skip > layers:
        raise WeightsError(
            f"family.clip_skip is {clip_skip}, and the text encoder of {base.name} has {layers} "
            f"layers. Choose 1 to {layers}."
        )


def empty_clip(base: Base, component: str, *, projected: bool = False) -> nn.Module:
    """A CLIP text encoder on the meta device, from its config.

    Args:
        projected: with the projection of its pooled state (CLIPTextModelWithProjection).
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config: Any = CLIPTextConfig.from_dict(base.config(component))
    # It would drop in training mode, which checkpointing needs, and by torch's generator.
    config.attention_dropout = 0.0
    with torch.device("meta"):
        made: nn.Module = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    return made.requires_grad_(False).eval()


def load_clip(
    base: Base,
    component: str,
    *,
    projected: bool = False,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """A frozen CLIP text encoder, filled from the base's weights."""
    clip = empty_clip(base, component, projected=projected)
    for module in clip.modules():
        held = getattr(module, "position_ids", None)
        if isinstance(held, Tensor) and held.is_meta:  # in no file: a count from 0
            module.position_ids = torch.arange(held.shape[-1], device=device).expand((1, -1))
    expected = clip.state_dict().keys()
    # Files have the level or not, as the program that wrote them had it.
    names = {name.removeprefix(LEVEL): name for name in expected}
    weights = {
        names[name.removeprefix(LEVEL)]: tensor
        for name, tensor in base.weights(component).items()
        if name.removeprefix(LEVEL) in names
    }
    return fill(clip, weights, dtype=dtype, device=device).requires_grad_(False).eval()


def clip_sites(component: str, encoder: nn.Module) -> list[Site]:
    """Attention, MLP and norms of every layer, in order, and the norm behind the last.

    Raises:
        WeightsError: the linears are not those that the config means.
    """
    found = []
    for path, module in encoder.named_modules():
        path = path.removeprefix(LEVEL)
        layer = re.match(r"encoder\.layers\.(\d+)\.", path)
        if layer is None and path != "final_layer_norm":
            continue
        config: Any = encoder.config
        number = int(layer[1]) if layer else int(config.num_hidden_layers)
        role: Role = "mlp" if ".mlp." in path else "attention"
        name = f"{component}.{LEVEL}{path}"
        site = site_of(name, module, role=role, section="text", number=number)
        found += [site] if site else []
    linears = sum(site.kind == "linear" for site in found)
    expect_layers("text encoder", linears, 6 * int(config.num_hidden_layers))
    return found


def clip_units(component: str, encoder: nn.Module) -> list[Unit]:
    """Its layers, in the order in which they run."""
    # Models with a projection hold the text model within; the plain ones are it.
    text: Any = getattr(encoder, "text_model", encoder)
    return [
        Unit(f"{component}.encoder.layers.{number}", layer, (layer.mlp,))
        for number, layer in enumerate(text.encoder.layers)
    ]


def clip_place(name: str, prefix: str) -> Place:
    """Where kohya's files keep a text encoder's layer, e.g. `lora_te1_text_model_encoder_…`."""
    return Place(prefix, name.partition(".")[2])


def read_clip(encoder: Any, chunks: Chunks, *, skip: int, normed: bool) -> Read:
    """What the denoiser is given of captions.

    Args:
        encoder: a CLIPTextModel of transformers, with or without a projection.
        skip: which layer's output is taken, counted from the last, which is 1.
        normed: CLIP's final norm follows it, as in SD 1.x and 2.x; without it in SDXL and SD 3.

    Returns:
        In the encoder's dtype. Only the hidden states are weighted.
    """
    ids_BNT = chunks.ids_BNT.to(encoder.device, non_blocking=True)
    output = encoder(ids_BNT.flatten(0, 1), output_hidden_states=skip > 1 or not normed)
    if normed and skip == 1:
        hidden = output.last_hidden_state
    else:
        hidden = output.hidden_states[-skip]
        if normed:
            # Models with a projection hold the text model within; the plain ones are it.
            hidden = getattr(encoder, "text_model", encoder).final_layer_norm(hidden)
    projected = getattr(output, "text_embeds", None)
    pooled = output.pooler_output if projected is None else projected
    many = ids_BNT.shape[:2]
    return Read(join_chunks(hidden.unflatten(0, many), chunks), pooled.unflatten(0, many)[:, 0])
