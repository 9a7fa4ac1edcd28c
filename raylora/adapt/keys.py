"""The names in LoRA files: what a key says of layer and tensor, in every program's spelling.

    kohya      lora_unet_…, lora_te_…, lora_te1_….lora_down.weight, .lora_up.weight, .alpha, …
    LyCORIS    the same words under the same names, or under lycoris_…
    OneTrainer lora_transformer_…
    diffusers  unet.…, transformer.…, text_encoder[_2|_3].…, with .lora_A.weight and .lora_B.weight
    ComfyUI    diffusion_model.…, text_encoders.clip_l.…, in the words of either
    peft       base_model.model.…, in diffusers' words

A key is told apart into the module's name and kohya's word for the tensor; so that all else in the
package knows one set of words. raylora's own name of a layer, a site's, is diffusers'.
"""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

Naming = Literal["kohya", "diffusers", "comfyui"]
"""Whose names a file is written in."""
Spelling = Literal["kohya", "lycoris", "onetrainer", "diffusers", "comfyui", "peft"]
"""Whose names a file that is read has."""

WORDS = (
    "lora_down.weight",
    "lora_up.weight",
    "lora_mid.weight",
    "dora_scale",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "oft_blocks",
    "rescale",
    "a1.weight",
    "a2.weight",
    "b1.weight",
    "b2.weight",
    "bm.weight",
    "diff",
    "diff_b",
    "w_norm",
    "b_norm",
    "on_input",
    "alpha",
    "weight",
)
"""Kohya's and LyCORIS' words for tensors; "weight", (IA)³'s, is the end of others, so the last."""

# Spellings of the two halves and of DoRA's magnitude by diffusers and peft, present and past.
_OTHER_WORDS = (
    (re.compile(r"\.lora_A(\.default)?\.weight$"), "lora_down.weight"),
    (re.compile(r"\.lora_B(\.default)?\.weight$"), "lora_up.weight"),
    (re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?$"), "dora_scale"),
    (re.compile(r"(_lora|\.lora|\.lora_linear_layer)\.down\.weight$"), "lora_down.weight"),
    (re.compile(r"(_lora|\.lora|\.lora_linear_layer)\.up\.weight$"), "lora_up.weight"),
)
_STARTS: tuple[tuple[re.Pattern[str], Spelling], ...] = (
    (re.compile(r"lora_(unet|te\d?)_[\w-]+$", re.ASCII), "kohya"),
    (re.compile(r"lycoris_[\w-]+$", re.ASCII), "lycoris"),
    (re.compile(r"lora_transformer_[\w-]+$", re.ASCII), "onetrainer"),
    (re.compile(r"(unet|transformer|text_encoder(_[23])?)\.."), "diffusers"),
    (re.compile(r"(diffusion_model|text_encoders)\.."), "comfyui"),
    (re.compile(r"base_model\.model\.."), "peft"),
)
_TEXT_LEVEL = "text_model."


def split_key(key: str) -> tuple[str, str] | None:
    """(module's name, kohya's word for the tensor) of a key; None where it is no adapter's.

    Names of older diffusers' attention processors come in the present spelling.
    """
    for pattern, word in _OTHER_WORDS:
        if found := pattern.search(key):
            name = key[: found.start()]
            return (_present(name), word) if spelling_of(name) else None
    for word in WORDS:
        if key.endswith(f".{word}"):
            name = key.removesuffix(f".{word}")
            return (name, word) if spelling_of(name) else None
    return None


def spelling_of(name: str) -> Spelling | None:
    """Whose name of a module it is; None where it is nobody's that is known."""
    return next((spelling for start, spelling in _STARTS if start.match(name)), None)


def _present(name: str) -> str:
    """`….attn1.processor.to_q` as diffusers spells it now; text encoders' layers by their own."""
    name = name.replace(".processor.", ".")
    if name.endswith(".to_out"):
        name += ".0"
    if name.startswith("text_encoder") and ".self_attn.to_" in name:
        head, _, layer = name.rpartition(".to_")
        name = f"{head}.{layer.removesuffix('.0')}_proj"
    return name


def with_text_level(name: str) -> str:
    """A text encoder's layer with the level `text_model.` that transformers 5 leaves out."""
    component, _, path = name.partition(".")
    if path.startswith(("encoder.layers.", "final_layer_norm")):
        path = _TEXT_LEVEL + path
    return f"{component}.{path}"


def layer_at(model: nn.Module, name: str) -> nn.Module:
    """The layer of raylora's name in the model that its component is, whatever its levels."""
    path = name.partition(".")[2]
    try:
        return model.get_submodule(path)
    except AttributeError:
        return model.get_submodule(path.removeprefix(_TEXT_LEVEL))
