"""What a file needs so that diffusers applies it as it was trained; ΔW stays what it was.

Found by loading every kind of file into a real pipeline with diffusers 0.42 and peft 0.21:

- kohya's naming: q, k and v of a text encoder are refused, or dropped without a word, where the
  file has no `out_proj` of any layer; diffusers' own naming is refused where it has nothing of a
  text encoder's attention. One `out_proj` that adds nothing helps both.
- kohya's naming: where alphas differ within a model, attention of the UNet and all of a text
  encoder get the alpha that most modules have. Ranks may differ anywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from raylora.adapt.deltas import at_scale
from raylora.adapt.keys import Naming, component_of
from raylora.adapt.lora_file import ALPHA, DOWN, UP, AdapterModule

_TEXT_LAYER = re.compile(r"(.*layers[._]\d+[._])(self_attn([._])|mlp[._])(\w+)")


def readable(modules: Sequence[AdapterModule], naming: Naming) -> list[AdapterModule]:
    """The same adapter, as a file of that naming has to hold it."""
    return one_alpha(completed(modules, naming))


def completed(modules: Sequence[AdapterModule], naming: Naming) -> list[AdapterModule]:
    """With an `out_proj` of zeros where diffusers needs one to see the other layers."""
    text = [module for module in modules if component_of(module.name) == "text_encoder"]
    attention = [module for module in text if "self_attn" in module.name]
    outputs = [module for module in attention if module.name.endswith("out_proj")]
    needed = not attention if naming == "diffusers" else attention and not outputs
    found = _TEXT_LAYER.fullmatch(text[0].name) if text else None
    if not needed or found is None:
        return list(modules)
    model = text[0]
    # As wide as its neighbour is on the side that is the model's own width.
    width = model.tensors[UP].shape[0] if found[4] == "fc2" else model.tensors[DOWN].shape[1]
    dot = "_" if model.name.startswith("lora_") else "."
    return [*modules, _nothing(f"{found[1]}self_attn{dot}out_proj", int(width), model)]


def one_alpha(modules: Sequence[AdapterModule]) -> list[AdapterModule]:
    """With one alpha for each model: that of most modules; where it was another, the halves are."""
    alphas: dict[str, Counter[float]] = {}
    for module in modules:
        alphas.setdefault(component_of(module.name), Counter())[module.alpha] += 1
    common = {
        component: max(counted, key=lambda alpha: (counted[alpha], alpha))
        for component, counted in alphas.items()
    }
    return [_with_alpha(module, common[component_of(module.name)]) for module in modules]


def _nothing(name: str, width: int, like: AdapterModule) -> AdapterModule:
    dtype = like.tensors[DOWN].dtype
    tensors: dict[str, Tensor] = {
        DOWN: torch.zeros(like.rank, width, dtype=dtype),
        UP: torch.zeros(width, like.rank, dtype=dtype),
        ALPHA: torch.tensor(like.alpha, dtype=torch.float32),
    }
    return AdapterModule(name, tensors)


def _with_alpha(module: AdapterModule, alpha: float) -> AdapterModule:
    if module.alpha == alpha:
        return module
    down, up, _ = at_scale(module.low_rank, alpha / module.rank)
    held = {DOWN: down, UP: up, ALPHA: torch.tensor(alpha, dtype=torch.float32)}
    return AdapterModule(module.name, held)
