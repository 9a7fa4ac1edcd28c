"""T5 text encoders: loaded from a base, their layers, and captions as they read them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylora.base.site import Place, Role, Site
from raylora.base.unit import Unit
from raylora.components.sites import expect_layers, site_of
from raylora.weights.base import Base
from raylora.weights.fill import fill

MOST_T5_TOKENS = 512
"""What T5 was trained with; bases were trained with no more."""
_EMBEDDINGS = ("encoder.embed_tokens.weight", "shared.weight")
_LAYER = re.compile(r"encoder\.block\.(?P<number>\d+)\.layer\.\d+\.(?P<rest>.+)")


class Padded(NamedTuple):
    """B captions of one length, cut or padded at the end; both int64."""

    ids_BT: NDArray[np.int64]
    mask_BT: NDArray[np.int64]
    """1 where the caption is, with its last token; 0 in the padding behind it."""


def padded_tokens(tokenizer: Any, captions: Sequence[str], length: int) -> Padded:
    """Captions with a tokenizer's own first and last tokens, `length` tokens each.

    Args:
        tokenizer: of T5 or of CLIP.
    """
    found = tokenizer(
        list(captions),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_attention_mask=True,
    )
    ids = np.array(found.input_ids, np.int64)
    return Padded(ids, np.array(found.attention_mask, np.int64))


def count_caption_tokens(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption, uncut, without those that every caption gets."""
    # A tokenizer refuses an empty list; `verbose` would warn of every long caption.
    held = [*captions, ""]
    ids = tokenizer(held, add_special_tokens=False, verbose=False).input_ids
    return [len(tokens) for tokens in ids[:-1]]


def empty_t5(base: Base, component: str) -> nn.Module:
    """A T5 encoder on the meta device, from its config."""
    from transformers import T5Config, T5EncoderModel

    config: Any = T5Config.from_dict(base.config(component))
    # It would drop in training mode, which checkpointing needs, and by torch's generator.
    config.dropout_rate = 0.0
    with torch.device("meta"):
        t5: nn.Module = T5EncoderModel(config)
    return t5.requires_grad_(False).eval()


def load_t5(base: Base, component: str, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A frozen T5 encoder, filled from the base's weights, one table of embeddings under its two
    names.

    In float16 the layers out of the MLPs stay in float32: T5's own numbers overflow there.
    """
    t5: Any = empty_t5(base, component)
    t5.encoder.embed_tokens = None
    weights = base.weights(component)
    names = {name for name in t5.state_dict() if name not in _EMBEDDINGS}
    held = {name: tensor for name, tensor in weights.items() if name in names}
    fill(t5, {**held, **_embeddings(weights)}, dtype=dtype, device=device)
    t5.encoder.embed_tokens = t5.shared
    if dtype == torch.float16:
        for path, layer in t5.named_modules():
            if path.endswith(".wo"):
                exact = weights[f"{path}.weight"].to(dtype=torch.float32, device=device)
                layer.weight = nn.Parameter(exact)
    frozen: nn.Module = t5.requires_grad_(False).eval()
    return frozen


def _embeddings(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Files have one of the names, or both for the same numbers."""
    found = next((weights[name] for name in _EMBEDDINGS if name in weights), None)
    return {} if found is None else {"shared.weight": found}


def t5_sites(component: str, encoder: nn.Module) -> list[Site]:
    """Attention, MLP and norms of every block, in order, and the norm behind the last.

    Raises:
        WeightsError: the linears are not those that the config means.
    """
    config: Any = encoder.config
    found = []
    for path, module in encoder.named_modules():
        block = _LAYER.fullmatch(path)
        if block is None and path != "encoder.final_layer_norm":
            continue
        number = int(block["number"]) if block else int(config.num_layers)
        attention = block is not None and block["rest"].startswith("SelfAttention")
        role: Role = "attention" if attention else "mlp"
        site = site_of(f"{component}.{path}", module, role=role, section="text", number=number)
        found += [site] if site else []
    linears = sum(site.kind == "linear" for site in found)
    mlp = 3 if config.is_gated_act else 2
    expect_layers("T5 text encoder", linears, (4 + mlp) * int(config.num_layers))
    return found


def t5_units(component: str, encoder: nn.Module) -> list[Unit]:
    """Its blocks, in the order in which they run."""
    model: Any = encoder
    return [
        Unit(f"{component}.encoder.block.{number}", block, (block.layer[-1],))
        for number, block in enumerate(model.encoder.block)
    ]


def t5_place(name: str, prefix: str) -> Place:
    """Where kohya's files keep a layer, e.g. `lora_te3_encoder_block_0_layer_0_SelfAttention_q`."""
    return Place(prefix, name.partition(".")[2])


def read_t5(encoder: Any, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """What T5 says of captions, (B, T, D) in its dtype.

    Args:
        mask_BT: 0 where tokens are not looked at; None looks at all, padding too.
    """
    device = encoder.device
    mask = None if mask_BT is None else mask_BT.to(device, non_blocking=True)
    ids = ids_BT.to(device, non_blocking=True)
    read: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return read
