"""Tiny bases as single checkpoints: the makers' names, written from diffusers' the other way round.

Nothing here is shared with the reader.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_TIME = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def component(folder: Path, name: str) -> Weights:
    """Of a folder in diffusers layout."""
    found: Weights = load_file(next((folder / name).glob("*.safetensors")))
    return found


def with_level(weights: Weights) -> Weights:
    """CLIP's names with the level that files have and transformers 5's plain model has not."""
    return {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": one
        for name, one in weights.items()
    }


def unet(weights: Weights, deep: int = 1) -> Weights:
    """A UNet with `deep` layers a level on the way down; the tiny ones have one."""
    found = {}
    for name, tensor in weights.items():
        stem, _, word = name.rpartition(".")
        if stem in _TIME:
            found[f"{_TIME[stem]}.{word}"] = tensor
            continue
        parts = re.match(r"(down|mid|up)_blocks?\.?(\d?)\.(\w+)\.(\d+)\.(.+)", stem)
        assert parts is not None, stem
        way, number, kind, index, rest = parts.groups()
        first = (deep + 1) * int(number or 0)
        within = {"resnets": 0, "attentions": 1}.get(kind)
        if kind == "resnets":
            rest = _RESNET[rest]
        if way == "mid":
            place = f"middle_block.{1 if within else 2 * int(index)}"
        elif kind == "downsamplers":
            place, rest = f"input_blocks.{first + deep + 1}.0", "op"
        elif kind == "upsamplers":
            attended = any(f"up_blocks.{number}.attentions" in one for one in weights)
            place = f"output_blocks.{first + deep}.{2 if attended else 1}"
        elif way == "down":
            place = f"input_blocks.{first + int(index) + 1}.{within}"
        else:
            place = f"output_blocks.{first + int(index)}.{within}"
        found[f"{place}.{rest}.{word}"] = tensor
    return found


def vae(weights: Weights, levels: int = 2) -> Weights:
    """1x1 convolutions in the middle's attention, and the way up counted from the end."""
    found = {}
    for name, tensor in weights.items():
        up = re.search(r"up_blocks\.(\d)", name)
        if up:
            name = name.replace(up[0], f"up.{levels - 1 - int(up[1])}")
        name = name.replace("down_blocks", "down").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            for ours, theirs in {
                "group_norm": "norm",
                "to_q": "q",
                "to_k": "k",
                "to_v": "v",
                "to_out.0": "proj_out",
            }.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace(".resnets.", ".block.").replace("conv_norm_out", "norm_out")
        name = name.replace("samplers.0.", "sample.")
        found[name] = tensor.contiguous()
    return found


def open_clip(weights: Weights) -> Weights:
    """q, k and v joined, the projection turned."""
    weights = with_level(weights)
    found = {}
    for name, tensor in weights.items():
        ends = {
            "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
            "text_model.embeddings.position_embedding.weight": "positional_embedding",
            "text_model.final_layer_norm.weight": "ln_final.weight",
            "text_model.final_layer_norm.bias": "ln_final.bias",
        }
        if name in ends:
            found[ends[name]] = tensor
        elif name == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        elif ".self_attn." in name and "out_proj" not in name:
            layer, word = name.split(".")[3], name.rpartition(".")[2]
            stem = f"text_model.encoder.layers.{layer}.self_attn"
            joined = torch.cat([weights[f"{stem}.{one}_proj.{word}"] for one in "qkv"])
            found[f"transformer.resblocks.{layer}.attn.in_proj_{word}"] = joined
        else:
            for ours, theirs in {
                "text_model.encoder.layers": "transformer.resblocks",
                "self_attn": "attn",
                "layer_norm": "ln_",
                "fc1": "c_fc",
                "fc2": "c_proj",
            }.items():
                name = name.replace(ours, theirs)
            found[name] = tensor
    return found


def _joined(weights: Weights, path: str, names: tuple[str, ...], word: str) -> Tensor:
    return torch.cat([weights[f"{path}.{name}.{word}"] for name in names])


def _swapped(tensor: Tensor) -> Tensor:
    half = tensor.shape[0] // 2
    return torch.cat([tensor[half:], tensor[:half]])


_EMBEDDERS = {
    "timestep_embedder": ("t_embedder.mlp", "time_in"),
    "text_embedder": ("y_embedder.mlp", "vector_in"),
    "guidance_embedder": ("", "guidance_in"),
}


def sd3(weights: Weights) -> Weights:
    """The transformer of SD 3 and 3.5."""
    found = {"pos_embed": weights["pos_embed.pos_embed"]}
    numbers = {name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")}
    for word in ("weight", "bias"):
        found[f"x_embedder.proj.{word}"] = weights[f"pos_embed.proj.{word}"]
        found[f"context_embedder.{word}"] = weights[f"context_embedder.{word}"]
        found[f"final_layer.linear.{word}"] = weights[f"proj_out.{word}"]
        norm = _swapped(weights[f"norm_out.linear.{word}"])
        found[f"final_layer.adaLN_modulation.1.{word}"] = norm
        for ours, (theirs, _) in list(_EMBEDDERS.items())[:2]:
            for end, number in (("linear_1", 0), ("linear_2", 2)):
                held = weights[f"time_text_embed.{ours}.{end}.{word}"]
                found[f"{theirs}.{number}.{word}"] = held
        for number in numbers:
            path, block = f"transformer_blocks.{number}", f"joint_blocks.{number}"
            last = int(number) == len(numbers) - 1
            for side, attn, names in (
                ("x_block", "attn", ("attn.to_q", "attn.to_k", "attn.to_v")),
                ("x_block", "attn2", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
                (
                    "context_block",
                    "attn",
                    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                ),
            ):
                if f"{path}.{names[0]}.{word}" in weights:
                    joined = _joined(weights, path, names, word)
                    found[f"{block}.{side}.{attn}.qkv.{word}"] = joined
            context = weights[f"{path}.norm1_context.linear.{word}"]
            found[f"{block}.context_block.adaLN_modulation.1.{word}"] = (
                _swapped(context) if last else context
            )
            for ours, theirs in {
                "norm1.linear": "x_block.adaLN_modulation.1",
                "attn.to_out.0": "x_block.attn.proj",
                "attn2.to_out.0": "x_block.attn2.proj",
                "attn.to_add_out": "context_block.attn.proj",
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
                "attn.norm_q": "x_block.attn.ln_q",
                "attn.norm_k": "x_block.attn.ln_k",
                "attn2.norm_q": "x_block.attn2.ln_q",
                "attn2.norm_k": "x_block.attn2.ln_k",
                "attn.norm_added_q": "context_block.attn.ln_q",
                "attn.norm_added_k": "context_block.attn.ln_k",
            }.items():
                held = weights.get(f"{path}.{ours}.{word}")
                if held is not None:
                    found[f"{block}.{theirs}.{word}"] = held
    return found


def flux(weights: Weights) -> Weights:
    """FLUX.1's transformer."""
    found = {}
    for word in ("weight", "bias"):
        found[f"img_in.{word}"] = weights[f"x_embedder.{word}"]
        found[f"txt_in.{word}"] = weights[f"context_embedder.{word}"]
        found[f"final_layer.linear.{word}"] = weights[f"proj_out.{word}"]
        norm = _swapped(weights[f"norm_out.linear.{word}"])
        found[f"final_layer.adaLN_modulation.1.{word}"] = norm
        for ours, (_, theirs) in _EMBEDDERS.items():
            for end, layer in (("linear_1", "in_layer"), ("linear_2", "out_layer")):
                held = weights.get(f"time_text_embed.{ours}.{end}.{word}")
                if held is not None:
                    found[f"{theirs}.{layer}.{word}"] = held
        for path in {
            re.match(r"(single_)?transformer_blocks\.\d+", name)[0]
            for name in weights
            if "transformer_blocks" in name
        }:
            found.update(_flux_block(weights, path, word))
    return found


def _flux_block(weights: Weights, path: str, word: str) -> Weights:
    number = path.rpartition(".")[2]
    qkv = ("attn.to_q", "attn.to_k", "attn.to_v")
    if path.startswith("single"):
        block = f"single_blocks.{number}"
        joined = {"linear1": (*qkv, "proj_mlp")}
        plain = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
        norms = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
    else:
        block = f"double_blocks.{number}"
        joined = {
            "img_attn.qkv": qkv,
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        }
        plain = {
            "norm1.linear": "img_mod.lin",
            "norm1_context.linear": "txt_mod.lin",
            "ff.net.0.proj": "img_mlp.0",
            "ff.net.2": "img_mlp.2",
            "ff_context.net.0.proj": "txt_mlp.0",
            "ff_context.net.2": "txt_mlp.2",
            "attn.to_out.0": "img_attn.proj",
            "attn.to_add_out": "txt_attn.proj",
        }
        norms = {
            "attn.norm_q": "img_attn.norm.query_norm",
            "attn.norm_k": "img_attn.norm.key_norm",
            "attn.norm_added_q": "txt_attn.norm.query_norm",
            "attn.norm_added_k": "txt_attn.norm.key_norm",
        }
    found = {f"{block}.{b}.{word}": _joined(weights, path, a, word) for b, a in joined.items()}
    found |= {f"{block}.{b}.{word}": weights[f"{path}.{a}.{word}"] for a, b in plain.items()}
    if word == "weight":
        found |= {f"{block}.{b}.scale": weights[f"{path}.{a}.weight"] for a, b in norms.items()}
    return found


def below(prefix: str, weights: Weights) -> Weights:
    """With a prefix before each name."""
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def checkpoint(kind: str, folder: Path) -> Weights:
    """A whole checkpoint of a tiny base, by the words of jobs/smoke/make_bases.py."""
    held = below("model.diffusion_model.", denoiser(kind, folder))
    if kind in ("flux1", "schnell"):
        return held
    held |= below("first_stage_model.", vae(component(folder, "vae")))
    first = component(folder, "text_encoder")
    if kind == "sd15":
        return held | below("cond_stage_model.transformer.", with_level(first))
    if kind == "sd2":
        return held | below("cond_stage_model.model.", open_clip(first))
    second = component(folder, "text_encoder_2")
    if kind == "sdxl":
        held |= below("conditioner.embedders.0.transformer.", with_level(first))
        return held | below("conditioner.embedders.1.model.", open_clip(second))
    held |= below("text_encoders.clip_l.transformer.", with_level(first))
    held |= below("text_encoders.clip_g.transformer.", with_level(second))
    third = component(folder, "text_encoder_3")
    return held | below("text_encoders.t5xxl.transformer.", third)


def denoiser(kind: str, folder: Path) -> Weights:
    """By the makers' names, without a prefix."""
    if kind in ("sd15", "sd2", "sdxl"):
        return unet(component(folder, "unet"))
    held = component(folder, "transformer")
    return flux(held) if kind in ("flux1", "schnell") else sd3(held)


def save(weights: Weights, path: Path, metadata: dict[str, Any] | None = None) -> str:
    """As a .safetensors file; its path."""
    save_file({name: one.contiguous().clone() for name, one in weights.items()}, path, metadata)
    return str(path)
