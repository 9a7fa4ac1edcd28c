"""What a file needs so that diffusers applies it as it was trained; ΔW stays what it was.

Found by loading every kind of file into a real pipeline with diffusers 0.42 and peft 0.21:

- kohya's naming: q, k and v of a text encoder are refused, or dropped without a word, where the
  file has no `out_proj` of any layer; diffusers' own naming is refused where it has nothing of a
  text encoder's attention. One `out_proj` that adds nothing helps both. Of each CLIP by itself.
- kohya's naming of the families with a UNet: where alphas differ within a model, attention of the
  UNet and all of a text encoder get the alpha that most modules have. Ranks may differ anywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from raylora.adapt.deltas import at_scale
from raylora.adapt.keys import Naming
from raylora.adapt.kinds import DORA
from raylora.adapt.lora_file import ALPHA, DOWN, UP, AdapterModule
from raylora.base.errors import ExportError

_CLIP_LAYER = re.compile(r"(text_encoder\w*)\.(text_model\.encoder\.layers\.\d+\.)(.+)")


def readable(
    modules: Sequence[AdapterModule], naming: Naming, *, alphas: bool = True
) -> list[AdapterModule]:
    """The same adapter, as a file of that naming has to hold it; modules are named by sites.

    Args:
        alphas: whether alphas have to be one for each model.
    """
    if naming != "diffusers" and any(not module.is_low_rank for module in modules):
        return list(modules)  # diffusers reads no such file
    found = completed(modules, naming)
    return one_alpha(found) if alphas else found


def completed(modules: Sequence[AdapterModule], naming: Naming) -> list[AdapterModule]:
    """With an `out_proj` of zeros in each CLIP where diffusers needs one to see the rest."""
    layers: dict[str, list[AdapterModule]] = {}
    for module in modules:
        if found := _CLIP_LAYER.fullmatch(module.name):
            layers.setdefault(found[1], []).append(module)
    added = []
    for held in layers.values():
        attention = [module for module in held if "self_attn" in module.name]
        outputs = [module for module in attention if module.name.endswith("out_proj")]
        if not attention if naming == "diffusers" else attention and not outputs:
            added.append(_nothing(held[0]))
    return [*modules, *added]


def one_alpha(modules: Sequence[AdapterModule]) -> list[AdapterModule]:
    """With one alpha for each model: that of most modules; where it was another, the halves are."""
    alphas: dict[str, Counter[float]] = {}
    for module in modules:
        alphas.setdefault(_component(module), Counter())[module.alpha] += 1
    common = {
        component: max(counted, key=lambda alpha: (counted[alpha], alpha))
        for component, counted in alphas.items()
    }
    return [_with_alpha(module, common[_component(module)]) for module in modules]


def _component(module: AdapterModule) -> str:
    return module.name.partition(".")[0]


def _nothing(like: AdapterModule) -> AdapterModule:
    """An `out_proj` of zeros in the layer of a CLIP's module, as wide as the model is there."""
    if DORA in like.tensors:
        raise ExportError(
            f"Not saved: diffusers reads {like.name} only beside attention of the same text "
            "encoder. Set export.naming to kohya, or let network.layers have its attention."
        )
    found = _CLIP_LAYER.fullmatch(like.name)
    assert found is not None
    wide = like.tensors[UP].shape[0] if found[3] == "mlp.fc2" else like.tensors[DOWN].shape[1]
    width, dtype = int(wide), like.tensors[DOWN].dtype
    tensors: dict[str, Tensor] = {
        DOWN: torch.zeros(like.rank, width, dtype=dtype),
        UP: torch.zeros(width, like.rank, dtype=dtype),
        ALPHA: torch.tensor(like.alpha, dtype=torch.float32),
    }
    return AdapterModule(f"{found[1]}.{found[2]}self_attn.out_proj", tensors)


def _with_alpha(module: AdapterModule, alpha: float) -> AdapterModule:
    if module.alpha == alpha:
        return module
    down, up, _ = at_scale(module.low_rank, alpha / module.rank)
    held = {DOWN: down, UP: up, ALPHA: torch.tensor(alpha, dtype=torch.float32)}
    return AdapterModule(module.name, held)
