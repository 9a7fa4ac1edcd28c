"""The modules of a LoRA file, from an adapter's: names, words, and layers that files join.

Kohya's and ComfyUI's files keep FLUX' and SD 3's q, k and v in one layer. Joined, `down`s lie one
on another, `up`s in blocks on the diagonal, and alpha grows with the rank, so that alpha / rank is
what it was:

    up_q  0     0        down_q
    0     up_k  0     ·  down_k
    0     0     up_v     down_v

What has no such form (LoHa, LoKr, OFT, DoRA, …) keeps its layers apart, under LyCORIS' names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from raylora.adapt.deltas import at_scale
from raylora.adapt.keys import Naming
from raylora.adapt.kinds import DORA, MID
from raylora.adapt.lora_file import ALPHA, DOWN, UP, AdapterModule
from raylora.adapt.onto import COMFYUI_ENCODERS, Names
from raylora.adapt.readable import readable
from raylora.base.errors import ExportError
from raylora.base.site import Place

UNET_KINDS = ("sd15", "sd2", "sdxl")


def laid_out(modules: Sequence[AdapterModule], names: Names, naming: Naming) -> list[AdapterModule]:
    """An adapter's modules as a file of that naming has to hold them.

    Args:
        modules: named by sites.

    Raises:
        ExportError: the naming has no words for a module.
    """
    if naming == "diffusers":
        _refuse_unnamed(modules)
        return [_in_diffusers_words(module) for module in readable(modules, naming, alphas=False)]
    if naming == "comfyui" and names.kind in ("sd15", "sd2"):
        raise ExportError(
            f"Not saved: ComfyUI reads kohya's names for {names.kind}. Set export.naming to kohya."
        )
    modules = readable(modules, naming, alphas=naming == "kohya" and names.kind in UNET_KINDS)
    places = {module.name: names.place(module.name) for module in modules}
    moved = [module for module in modules if _is_moved(places[module.name])]
    apart = any(not module.is_low_rank for module in moved)
    groups: dict[str, list[AdapterModule]] = {}
    for module in modules:
        component, _, path = module.name.partition(".")
        if apart and not component.startswith("text_encoder"):
            name = f"lycoris_{path.replace('.', '_')}"
            groups[name] = [module]
            continue
        place = places[module.name]
        name = place.kohya if naming == "kohya" else comfyui_name(place)
        groups.setdefault(name, []).append(_turned(module) if place.halves_swapped else module)
    return [_joined(name, parts, places, apart=apart) for name, parts in groups.items()]


def comfyui_name(place: Place) -> str:
    """The module's name in ComfyUI's files of XL, SD 3 and FLUX; the others have kohya's."""
    if place.prefix == "lora_unet":
        return f"diffusion_model.{place.path}"
    return f"text_encoders.{COMFYUI_ENCODERS[place.prefix][0]}.transformer.{place.path}"


def _is_moved(place: Place) -> bool:
    return place.rows is not None or place.halves_swapped


def _turned(module: AdapterModule) -> AdapterModule:
    """With the halves of the outputs in the other order."""
    up = module.tensors[UP]
    return AdapterModule(module.name, {**module.tensors, UP: up.roll(len(up) // 2, dims=0)})


def _joined(
    name: str, parts: Sequence[AdapterModule], places: Mapping[str, Place], *, apart: bool
) -> AdapterModule:
    """One module of the file, of one layer or of several."""
    spans = [places[part.name].rows for part in parts]
    if spans[0] is None or (apart and name.startswith("lycoris_")):
        return AdapterModule(name, dict(parts[0].tensors))
    held = [part.low_rank for part in parts]
    scale = Counter(own for _, _, own in held).most_common(1)[0][0]
    rank = sum(len(down) for down, _, _ in held)
    up_OR = torch.zeros(spans[0][2], rank, dtype=torch.float64)
    start = 0
    for span, (down, up, own) in zip(spans, held, strict=True):
        assert span is not None
        block = up.double() if own == scale else up.double() * (own / scale)
        up_OR[span[0] : span[1], start : start + len(down)] = block
        start += len(down)
    return AdapterModule(
        name,
        {
            DOWN: torch.cat([down.double() for down, _, _ in held]),
            UP: up_OR,
            ALPHA: torch.tensor(scale * rank, dtype=torch.float64),
        },
    )


def _refuse_unnamed(modules: Sequence[AdapterModule]) -> None:
    for module in modules:
        if DOWN not in module.tensors or MID in module.tensors:
            what = f"{module.kind} with {MID}" if MID in module.tensors else module.kind
            raise ExportError(
                f"Not saved: diffusers has no names for {what}, which {module.name} is. Set "
                "export.naming to kohya."
            )


def _in_diffusers_words(module: AdapterModule) -> AdapterModule:
    """diffusers' words have no alpha, so alpha / rank becomes part of the halves."""
    held = module.tensors
    down, up, _ = at_scale(module.low_rank, 1.0)
    tensors = {"lora_A.weight": down, "lora_B.weight": up}
    if DORA in held:
        magnitude = held[DORA]
        if magnitude.numel() != len(up):
            raise ExportError(
                f"Not saved: {module.name} has lengths by inputs, and diffusers reads them by "
                "outputs only. Set network.axis to output, or export.naming to kohya."
            )
        # peft keeps a convolution's magnitude by channels of its output, a linear's flat.
        tensors["lora_magnitude_vector"] = (
            magnitude.flatten() if down.dim() == 2 else magnitude.reshape(1, -1, 1, 1)
        )
    return AdapterModule(module.name, tensors)
