"""Weights of single checkpoints: from the makers' names to diffusers' and transformers'.

Joined weights are cut into views of the mapped file, so that nothing but two small layers, whose
halves change places, is copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from raylora.weights.original_tables import (
    FLUX_DOUBLE,
    FLUX_ENDS,
    FLUX_SINGLE,
    OPEN_CLIP_ENDS,
    OPEN_CLIP_LAYER,
    SD3_BLOCK,
    SD3_ENDS,
)

Weights = dict[str, Tensor]


def below(tensors: Mapping[str, Tensor], prefix: str) -> Weights:
    """The tensors whose names begin so, without that."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def count_blocks(names: Iterable[str], stem: str) -> int:
    """How many blocks there are of names like `stem.7.more`."""
    found = (re.match(rf"{re.escape(stem)}\.(\d+)\.", name) for name in names)
    return 1 + max((int(one[1]) for one in found if one), default=-1)


def flux_weights(tensors: Mapping[str, Tensor]) -> Weights:
    """FLUX.1's transformer."""
    tables = {"": FLUX_ENDS, "double_blocks": FLUX_DOUBLE, "single_blocks": FLUX_SINGLE}
    renamed = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
    # Wanted where q, k, v and the MLP's first layer are joined, which are not of one size.
    width = tensors["img_in.weight"].shape[0]
    found: Weights = {}
    for name, tensor in tensors.items():
        kind, number, stem, word = _parts(name, renamed)
        targets = tables[kind].get(stem)
        if targets is None:
            found[name] = tensor  # told as too much when the model is filled
            continue
        if stem == "final_layer.adaLN_modulation.1":
            tensor = _halves_swapped(tensor)
        path = f"{renamed[kind]}.{number}." if kind else ""
        word = "weight" if word == "scale" else word
        found.update(_split(tensor, path, targets, word, width if len(targets) == 4 else None))
    return found


def sd3_weights(tensors: Mapping[str, Tensor]) -> Weights:
    """Stable Diffusion 3's transformer, 3.5's too."""
    last = str(count_blocks(tensors, "joint_blocks") - 1)
    found: Weights = {}
    for name, tensor in tensors.items():
        if name == "pos_embed":
            found["pos_embed.pos_embed"] = tensor
            continue
        kind, number, stem, word = _parts(name, ("joint_blocks",))
        targets = (SD3_BLOCK if kind else SD3_ENDS).get(stem)
        if targets is None:
            found[name] = tensor  # told as too much when the model is filled
            continue
        # Two norms are diffusers' AdaLayerNormContinuous, which has scale before shift.
        of_last = number == last and stem == "context_block.adaLN_modulation.1"
        if of_last or stem == "final_layer.adaLN_modulation.1":
            tensor = _halves_swapped(tensor)
        path = f"transformer_blocks.{number}." if kind else ""
        found.update(_split(tensor, path, targets, word))
    return found


def unet_weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Weights:
    """The UNet of Stable Diffusion 1.x, 2.x and XL; a mere change of names, by diffusers."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    found: Weights = convert_ldm_unet_checkpoint(prefixed, dict(config))
    return found


def vae_weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Weights:
    """An autoencoder; a mere change of names, by diffusers."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    }
    if any(".down_blocks." in name for name in kept):
        return kept
    found: Weights = convert_ldm_vae_checkpoint(kept, dict(config))
    return found


def clip_weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Weights:
    """A CLIP text encoder, by transformers' names already or by OpenCLIP's.

    Args:
        config: says how many layers are read and whether there is a projection.
    """
    projected = "WithProjection" in str(config.get("architectures"))
    if any(".resblocks." in name for name in tensors):
        found = _open_clip_weights(tensors, int(config["num_hidden_layers"]))
    else:
        found = {name: one for name, one in tensors.items() if not name.endswith("position_ids")}
    if not projected:
        found.pop("text_projection.weight", None)
    elif "text_projection.weight" not in found:
        # SD 3's files leave out CLIP-L's, which its makers then take for one that changes nothing.
        width = int(config["hidden_size"])
        found["text_projection.weight"] = torch.eye(width)
    return {name: one for name, one in found.items() if name != "logit_scale"}


def _open_clip_weights(tensors: Mapping[str, Tensor], layers: int) -> Weights:
    found: Weights = {}
    for name, tensor in tensors.items():
        layer = re.match(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)$", name)
        if layer is None:
            if name == "text_projection":
                found["text_projection.weight"] = tensor.T
            elif name in OPEN_CLIP_ENDS:
                found[OPEN_CLIP_ENDS[name]] = tensor
            continue
        if int(layer[1]) >= layers:
            continue  # SD 2 reads the last but one
        path = f"text_model.encoder.layers.{layer[1]}."
        found.update(_split(tensor, path, OPEN_CLIP_LAYER[layer[2]], layer[3]))
    return found


def _parts(name: str, kinds: Iterable[str]) -> tuple[str, str, str, str]:
    """`double_blocks.7.img_attn.qkv.weight` -> `double_blocks`, `7`, `img_attn.qkv`, `weight`."""
    stem, _, word = name.rpartition(".")
    kind, _, rest = stem.partition(".")
    if kind not in kinds:
        return "", "", stem, word
    number, _, inner = rest.partition(".")
    return kind, number, inner, word


def _split(
    tensor: Tensor, path: str, targets: tuple[str, ...], word: str, width: int | None = None
) -> Weights:
    """The rows of a joined layer under the names of its parts, as views.

    Args:
        width: rows of all parts but the last, which has the rest; None: all are of one size.
    """
    rows, last = tensor.shape[0], len(targets) - 1
    each = rows // len(targets) if width is None else width
    pieces = tensor.split([each] * last + [rows - each * last])
    return {f"{path}{target}.{word}": one for target, one in zip(targets, pieces, strict=True)}


def _halves_swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
