"""Which model a single checkpoint holds, from the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from torch import Tensor

from raylora.base.errors import WeightsError
from raylora.weights.original_names import below, count_blocks

_PREFIXES = ("model.diffusion_model.", "")
"""Of the denoiser; files of the denoiser alone have none, or ComfyUI's, which is the same."""
FAMILIES = {
    "sd15": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL",
    "sd3": "Stable Diffusion 3",
    "flux1": "FLUX.1",
}
"""What people call them."""
_OTHERS = {
    "double_stream_modulation_img.lin.weight": "FLUX.2",
    "distilled_guidance_layer.in_proj.weight": "Chroma",
    "cap_embedder.0.weight": "Lumina or Z-Image",
    "blocks.0.cross_attn.k_img.weight": "Wan",
    "double_layers.0.attn.w1q.weight": "AuraFlow",
}
_ALONE = {
    "encoder.down.0.block.0.norm1.weight": "a VAE alone; set family.vae to it",
    "first_stage_model.encoder.down.0.block.0.norm1.weight": "a VAE alone; set family.vae to it",
    "encoder.down_blocks.0.resnets.0.norm1.weight": "a VAE alone; set family.vae to it",
    "text_model.final_layer_norm.weight": "a CLIP text encoder alone; set it in family.parts",
    "encoder.final_layer_norm.weight": "a T5 text encoder alone; set it in family.parts",
}


@dataclass(frozen=True)
class Recognised:
    """What a checkpoint holds.

    Attributes:
        kind: the family.
        usual: the usual base whose configs and tokenizers it shares, by its short name.
        denoiser: its denoiser, by the makers' names.
        changes: component -> what its config has otherwise than the usual base's.
    """

    kind: str
    usual: str
    denoiser: dict[str, Tensor] = field(repr=False)
    changes: dict[str, dict[str, Any]]


def recognise(
    name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], kind: str
) -> Recognised:
    """Tell a checkpoint's family and variant.

    Args:
        name: of the file, for sentences.
        metadata: of its header, which may tell what no tensor does.
        kind: the family that was asked for.

    Raises:
        WeightsError: it is of another family, or of none that raylora knows.
    """
    found = _recognise(name, tensors, metadata)
    if found.kind != kind:
        raise WeightsError(f"{name} is {FAMILIES[found.kind]}; set family.kind: {found.kind}.")
    return found


def _recognise(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Recognised:
    for prefix in _PREFIXES:
        held = below(tensors, prefix) if prefix else dict(tensors)
        for word, other in _OTHERS.items():
            if word in held:
                raise WeightsError(f"{name} is {other}, which raylora does not know.")
        if "double_blocks.0.img_attn.qkv.weight" in held:
            return _flux(name, held)
        if "joint_blocks.0.x_block.attn.qkv.weight" in held:
            return _sd3(held)
        if "input_blocks.0.0.weight" in held:
            return _unet(name, held, tensors, metadata)
    raise WeightsError(f"{name} {_unknown(tensors)}.")


def _unknown(tensors: Mapping[str, Tensor]) -> str:
    for word, what in _ALONE.items():
        if word in tensors:
            return f"holds {what}"
    if any(".lora_" in word or word.startswith("lora_") for word in tensors):
        return "is a LoRA, not a base; family.loras merges one into the base"
    if any(word.startswith(("transformer_blocks.", "down_blocks.")) for word in tensors):
        return (
            "has diffusers' names, which go into a folder in diffusers layout, beside a config.json"
        )
    first = ", ".join(sorted(tensors)[:3])
    return f"is no checkpoint of {', '.join(FAMILIES.values())} (its first tensors: {first})"


def _flux(name: str, held: dict[str, Tensor]) -> Recognised:
    channels = held["img_in.weight"].shape[1]
    guided = "guidance_in.in_layer.weight" in held
    if channels in (128, 384):
        raise WeightsError(
            f"{name} is a FLUX.1 model that is told a picture besides the text (its img_in has "
            f"{channels} channels), which raylora does not train. Give FLUX.1 [dev] or [schnell]."
        )
    changes = {
        "guidance_embeds": guided,
        "num_layers": count_blocks(held, "double_blocks"),
        "num_single_layers": count_blocks(held, "single_blocks"),
    }
    usual = "flux-dev" if guided else "flux-schnell"
    return Recognised("flux1", usual, held, {"transformer": changes})


def _sd3(held: dict[str, Tensor]) -> Recognised:
    layers = count_blocks(held, "joint_blocks")
    dual = [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in held]
    normed = "joint_blocks.0.x_block.attn.ln_q.weight" in held
    undoubled = "sd3.5-large" if normed else "sd3-medium"
    usual = "sd3.5-medium" if dual else undoubled
    changes: dict[str, Any] = {
        "num_layers": layers,
        "pos_embed_max_size": isqrt(held["pos_embed"].shape[1]),
    }
    if dual:
        changes["dual_attention_layers"] = dual
    return Recognised("sd3", usual, held, {"transformer": changes})


def _unet(
    name: str,
    held: dict[str, Tensor],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> Recognised:
    channels = held["input_blocks.0.0.weight"].shape[1]
    if channels != 4:
        raise WeightsError(
            f"{name} is an inpainting or editing model (its UNet reads {channels} channels), which "
            "raylora does not train. Give the model that it was made from."
        )
    if "edm_mean" in tensors or "edm_vpred.sigma_max" in tensors:
        raise WeightsError(f"{name} was trained on EDM's noise, which raylora does not know.")
    text_width = _width(held)
    if "label_emb.0.0.weight" in held:
        if text_width == 1280:
            raise WeightsError(f"{name} is SDXL's refiner, which raylora does not train.")
        return Recognised("sdxl", "sdxl", held, _scheduler(tensors, metadata, "epsilon"))
    linear = held["input_blocks.1.1.proj_in.weight"].ndim == 2
    if linear or text_width == 1024:
        return Recognised("sd2", "sd21", held, _scheduler(tensors, metadata, "v_prediction"))
    return Recognised("sd15", "sd15", held, _scheduler(tensors, metadata, "epsilon"))


def _width(held: Mapping[str, Tensor]) -> int:
    """Of the text that the UNet is given."""
    return next(one.shape[1] for name, one in held.items() if name.endswith("attn2.to_k.weight"))


def _scheduler(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], usual: str
) -> dict[str, dict[str, Any]]:
    """What the UNet predicts, by the first of these that says it: tensors named v_pred and ztsnr,
    which v-prediction models of SDXL carry; the header's modelspec; what is usual in the family.

    Nothing in the tensors of SD 2.x tells 768-v from 512-base: v is usual there, as 2.1 at 768
    predicts it, unless the header says "epsilon" or the file counts SD 2 base's 875,000 steps.
    """
    said = metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in tensors or said.startswith("v"):
        prediction = "v_prediction"
    elif said.startswith("eps") or _steps(tensors) == 875_000:
        prediction = "epsilon"
    else:
        prediction = usual
    changes: dict[str, Any] = {"prediction_type": prediction}
    if "ztsnr" in tensors:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {"scheduler": changes}


def _steps(tensors: Mapping[str, Tensor]) -> int | None:
    held = tensors.get("global_step")
    return int(held.flatten()[0]) if held is not None and held.numel() else None
