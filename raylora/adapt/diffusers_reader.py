"""A LoRA file as diffusers' own readers give it: one road to its weights that is not raylora's.

| family | kohya's naming | diffusers' | ComfyUI's |
| --- | --- | --- | --- |
| sd15, sd2, sdxl | read | read | not |
| flux1 | read, but for T5 and what is outside of the blocks | read | like kohya's |
| sd3 | not | read | not |

In kohya's naming it reads plain LoRA alone, in its own DoRA too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylora.adapt import kinds
from raylora.adapt.deltas import LowRank
from raylora.adapt.keys import split_key
from raylora.adapt.lora_file import ALPHA, DOWN, UP, AdapterFile, AdapterModule
from raylora.adapt.onto import Names
from raylora.base.errors import ExportError
from raylora.base.lookup import some_of

_NAMED = 5  # faults of one kind that a message names
_LOADERS = {
    "sd15": "StableDiffusionLoraLoaderMixin",
    "sd2": "StableDiffusionLoraLoaderMixin",
    "sdxl": "StableDiffusionXLLoraLoaderMixin",
    "sd3": "SD3LoraLoaderMixin",
    "flux1": "FluxLoraLoaderMixin",
}
_BLOCKS = re.compile(r"(lora_unet_|diffusion_model\.)(double|single)_blocks")
# The widths of q, k, v and the MLP that diffusers' reader of FLUX' single blocks takes for granted.
_FLUX_SINGLE = (3072, 3072, 3072, 12288)


@dataclass(frozen=True)
class Reading:
    """A LoRA file as diffusers' own reader gives it, by raylora's names.

    Attributes:
        modules: (down, up, alpha / rank), alpha as the file says and other programs apply it.
        magnitudes: DoRA's, of the modules that have one.
        loaded_scales: alpha / rank as diffusers' `load_lora_weights` applies it.
    """

    modules: dict[str, LowRank]
    loaded_scales: dict[str, float]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """Where diffusers would not apply what the file says: one sentence, or none."""
        wrong = [
            f"{name} ({self.loaded_scales[name]:g} for {scale:g})"
            for name, (_, _, scale) in sorted(self.modules.items())
            if not math.isclose(self.loaded_scales[name], scale, rel_tol=1e-6)
        ]
        if not wrong:
            return []
        return [
            "alpha differs between modules, and diffusers would apply another alpha / rank than "
            f"the file says: {some_of(wrong, _NAMED)}"
        ]

    def module(self, name: str) -> AdapterModule:
        """A module in kohya's words."""
        down, up, scale = self.modules[name]
        alpha = torch.tensor(scale * len(down), dtype=torch.float64)
        held = {DOWN: down, UP: up, ALPHA: alpha}
        if name in self.magnitudes:
            shape = (-1, *[1] * (down.dim() - 1))
            held[kinds.DORA] = self.magnitudes[name].reshape(shape)
        return AdapterModule(name, held)


def diffusers_reads(file: AdapterFile, kind: str) -> bool:
    """Whether diffusers has a reader for (most of) such a file of that family."""
    low = all(module.is_low_rank for module in file.modules.values())
    if file.spelling == "diffusers":
        return all(DOWN in module.tensors for module in file.modules.values())
    if kind == "flux1":
        return low and file.spelling in ("kohya", "comfyui")
    return low and file.spelling == "kohya" and kind in ("sd15", "sd2", "sdxl")


def leaves_out(name: str, kind: str) -> bool:
    """Whether diffusers' reader drops a module of a FLUX file of kohya's or ComfyUI's naming.

    Args:
        name: the file's.
    """
    if kind != "flux1" or name.startswith(("transformer.", "text_encoder.", "text_encoder_2.")):
        return False
    clip = name.startswith(("lora_te1_", "text_encoders.clip_l."))
    return not clip and _BLOCKS.match(name) is None


def read_with_diffusers(path: Path, names: Names, file: AdapterFile) -> Reading:
    """Every module of a LoRA file that diffusers reads, read by diffusers.

    Args:
        path: of a file whose name ends with .safetensors.
        file: what raylora found in it; its numbers are used only for FLUX, whose reader multiplies
            them by alpha in the file's own dtype.

    Raises:
        ExportError: diffusers refuses the file.
    """
    try:
        state, alphas, settings = _state(path, names, file)
        halves: dict[str, dict[str, Tensor]] = {}
        for key, tensor in _as_peft(state).items():
            found = split_key(key)
            if found is None:
                raise ValueError(f"unknown key {key}")
            halves.setdefault(found[0], {})[found[1]] = tensor
        _cut_padding(halves, names)
        loaded = _loaded_scales(halves, alphas, settings)
        told = _file_alphas(alphas)
        meant = {name: told[name] / len(halves[name][DOWN]) for name in told}
        if settings is not None:
            meant = loaded
        return Reading(
            {name: (held[DOWN], held[UP], meant.get(name, 1.0)) for name, held in halves.items()},
            loaded,
            {name: held[kinds.DORA] for name, held in halves.items() if kinds.DORA in held},
        )
    # The reader raises whatever its first surprised line raises; all of it means the same here.
    except Exception as error:
        said = " ".join(str(error).split())
        raise ExportError(
            f"diffusers cannot read the file ({type(error).__name__}: {said})"
        ) from error


def _state(
    path: Path, names: Names, file: AdapterFile
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Any] | None]:
    """(tensors in diffusers' names, alphas, peft's settings) from the family's reader."""
    import diffusers.loaders

    loader: Any = getattr(diffusers.loaders, _LOADERS[names.kind])
    if names.kind == "flux1" and file.spelling != "diffusers":
        state = loader.lora_state_dict(_for_flux(file, names))
        return state, {}, None
    words: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    if names.kind == "sdxl":
        from diffusers.configuration_utils import FrozenDict

        words["unet_config"] = FrozenDict(names.config)
    found = loader.lora_state_dict(str(path), return_lora_metadata=True, **words)
    if names.kind in ("sd3", "flux1"):
        state, settings = found
        return state, {}, settings
    state, alphas, settings = found
    return state, alphas or {}, settings


def _for_flux(file: AdapterFile, names: Names) -> dict[str, Tensor]:
    """A FLUX file's tensors in float64, without those that diffusers drops.

    A base that is not as wide as FLUX gets zeros up to that width, since the reader cuts the joined
    layers of single blocks at FLUX' own.
    """
    state: dict[str, Tensor] = {}
    for name, module in file.modules.items():
        if leaves_out(name, names.kind):
            continue
        held = {word: tensor.double() for word, tensor in module.tensors.items()}
        if "single_blocks" in name and name.endswith("linear1"):
            widths = _single_widths(names)
            parts = held[UP].split(widths)
            padded = [
                torch.nn.functional.pad(part, (0, 0, 0, wide - len(part)))
                for part, wide in zip(parts, _FLUX_SINGLE, strict=True)
            ]
            held[UP] = torch.cat(padded)
        state |= {f"{name}.{word}": tensor for word, tensor in held.items()}
    return state


def is_padded(file: AdapterFile, names: Names) -> bool:
    """Whether the file is for a FLUX narrower than diffusers' reader takes for granted."""
    joins = names.kind == "flux1" and file.spelling in ("kohya", "comfyui")
    return joins and tuple(_single_widths(names)) != _FLUX_SINGLE


def _single_widths(names: Names) -> list[int]:
    """Of q, k, v and the MLP of this base's single blocks."""
    heads = int(names.config["num_attention_heads"]) * int(names.config["attention_head_dim"])
    return [heads, heads, heads, 4 * heads]


def _cut_padding(halves: dict[str, dict[str, Tensor]], names: Names) -> None:
    if names.kind != "flux1":
        return
    heads, *_, mlp = _single_widths(names)
    for name, held in halves.items():
        if name.startswith("transformer.single_transformer_blocks."):
            wide = mlp if name.endswith("proj_mlp") else heads
            if ".attn." in name or name.endswith("proj_mlp"):
                held[UP] = held[UP][:wide]


def _as_peft(state: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' two older spellings to its present one, with diffusers' own tables."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    parts: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        parts.setdefault(key.partition(".")[0], {})[key] = value
    found: dict[str, Any] = {}
    for component, part in parts.items():
        if not component.startswith("text_encoder"):
            found |= convert_unet_state_dict_to_peft(part)
        elif any(".encoder.block." in key for key in part):
            found |= part  # T5, which diffusers saves and does not load
        else:
            found |= convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
    return found


def _file_alphas(network_alphas: Mapping[str, float]) -> dict[str, float]:
    """Alpha of each module; the reader hangs it on the module or on its lower half, by kind."""
    keys = {key.removesuffix(".alpha"): alpha for key, alpha in network_alphas.items()}
    whole = {key: alpha for key, alpha in keys.items() if not key.endswith(".down.weight")}
    lower = {key: alpha for key, alpha in keys.items() if key.endswith(".down.weight")}
    found = dict(whole)
    for key, alpha in _as_peft(lower).items():
        split = split_key(key)
        assert split is not None
        found[split[0]] = alpha
    return found


def _loaded_scales(
    halves: Mapping[str, Mapping[str, Tensor]],
    network_alphas: Mapping[str, float],
    settings: Mapping[str, Any] | None,
) -> dict[str, float]:
    """alpha / rank of each module as `load_lora_weights` will set it.

    That is not always what the file says: where alphas differ between modules, diffusers 0.42 hands
    peft patterns that no attention layer matches, and those get the alpha most modules have. So
    diffusers and peft are asked, not the file. `settings` are those that a file of diffusers' own
    naming may bring.
    """
    from diffusers.utils import get_peft_kwargs
    from peft.utils.other import get_pattern_key

    scales = {}
    for component in sorted({name.partition(".")[0] for name in halves}):
        text = component.startswith("text_encoder")
        # The text encoder's modules have no `text_model.` level in transformers 5.
        paths = {
            name: name.removeprefix(f"{component}.").removeprefix("text_model.")
            for name in halves
            if name.startswith(f"{component}.")
        }
        # As diffusers does: "^" keeps a path from matching the end of another.
        start = "" if text else "^"
        ranks = {
            f"{start}{path}.lora_B.weight": halves[name][UP].shape[1]
            for name, path in paths.items()
        }
        alphas = _of_component(network_alphas, component)
        if settings is None:
            config = get_peft_kwargs(ranks, alphas, dict.fromkeys(ranks), not text)
        else:
            config = {"alpha_pattern": {}, **_of_component(settings, component)}
        patterns = config["alpha_pattern"]
        for name, path in paths.items():
            alpha = patterns.get(get_pattern_key(list(patterns), path), config["lora_alpha"])
            rank = ranks[f"{start}{path}.lora_B.weight"]
            scales[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scales


def _of_component(words: Mapping[str, Any], component: str) -> dict[str, Any]:
    start = f"{component}."
    return {word.removeprefix(start): words[word] for word in words if word.startswith(start)}
