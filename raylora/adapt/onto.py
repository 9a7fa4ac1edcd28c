"""A file's modules, laid onto the layers of a base: every program's names for one layer.

FLUX and SD 3 keep q, k and v in one layer, and so do kohya's and ComfyUI's files; diffusers' models
keep them apart. A joined module is cut by its rows: each part keeps `down` and its rows of `up`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raylora.adapt import kinds
from raylora.adapt.keys import with_text_level
from raylora.adapt.lora_file import ALPHA, DOWN, UP, AdapterFile, AdapterModule
from raylora.base.errors import WeightsError
from raylora.base.lookup import some_of
from raylora.base.site import Place, Site
from raylora.families import Family

_NAMED = 3  # modules that a message names


@dataclass(frozen=True)
class _Spot:
    """A layer that a name in files means.

    Attributes:
        place: how the file's module holds it; None where that is as the base does.
    """

    site: Site
    place: Place | None = None


@dataclass(frozen=True)
class Names:
    """What files call the layers of one base.

    Attributes:
        kind: the family, as `family.kind` has it.
        place: a site's name -> where kohya's and ComfyUI's files keep it.
        config: of the denoiser, which diffusers needs to read SDXL's names.
    """

    kind: str
    place: Callable[[str], Place]
    config: Mapping[str, Any]


def names_of(family: Family) -> Names:
    """What files call the layers of a family's base."""
    kind = type(family).__module__.rpartition(".")[2]  # its file's name is the word in the YAML
    return Names(kind, family.place, family.base.config(family.component))


def all_sites(family: Family) -> list[Site]:
    """Every layer of a base that an adapter can sit on, without its weights."""
    denoiser, encoders = family.skeletons()
    return [*family.sites(denoiser), *family.text_sites(encoders)]


def onto(
    file: AdapterFile, sites: Iterable[Site], place: Callable[[str], Place]
) -> tuple[dict[str, AdapterModule], list[str]]:
    """(site name -> the module for that layer, the file's modules that are for none of the sites).

    Modules carry the site's name. What changes nothing is left out where it is part of a joined
    module or for no layer: it may be there only so that another reader sees the rest.

    Raises:
        WeightsError: two of the file's modules are for one layer, a joined module is of another
            size than the base's layers or of a kind that cannot be cut.
    """
    index = _index(sites, place)
    found: dict[str, AdapterModule] = {}
    left = []
    for name, module in file.modules.items():
        places = index.get(with_text_level(name) if name.startswith("text_encoder") else name)
        if places is None:
            left += [] if module.is_empty else [name]
            continue
        for spot in places:
            part = module if spot.place is None else _as_base_holds(module, spot.place)
            if part is None:
                continue
            if spot.site.name in found:
                raise WeightsError(f"{name}: the file has {spot.site.name} twice, by two names.")
            found[spot.site.name] = AdapterModule(spot.site.name, dict(part.tensors))
    return found, left


def refuse_left(left: Sequence[str]) -> None:
    """Refuse a file of which some modules are for no layer of the base.

    Raises:
        WeightsError: there are such.
    """
    if left:
        raise WeightsError(
            f"the base has no such layer for {len(left)} modules of the file: "
            f"{some_of(list(left), _NAMED)}. The LoRA is for another family, or for another size "
            "of this one."
        )


def check_sizes(module: AdapterModule, site: Site) -> None:
    """Refuse a module that is for a layer of another size.

    Raises:
        WeightsError: it is.
    """
    wanted = weight_shape(site)
    told = changed_shape(module, wanted)
    # A 1x1 convolution and a linear layer are the same; bases were saved with either.
    if told is not None and _without_ones(told) != _without_ones(wanted):
        raise WeightsError(
            f"{module.name}: the file's layer has a weight of {_times(told)}, the base's of "
            f"{_times(wanted)}. The LoRA was trained on another base."
        )


def weight_shape(site: Site) -> tuple[int, ...]:
    """Of a site's frozen weight."""
    if site.kind == "norm":
        return (site.inputs,)
    return (site.outputs, site.inputs, *(site.kernel if site.kind == "conv" else ()))


def changed_shape(module: AdapterModule, wanted: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of the weight that a module is for, as far as its tensors tell it; None: they do not.

    Args:
        wanted: the layer's, for kinds whose tensors tell one side alone.
    """
    held = module.tensors
    shape = {word: tuple(tensor.shape) for word, tensor in held.items()}
    if module.kind == "lora":
        kernel = shape[kinds.MID][2:] if kinds.MID in shape else shape[DOWN][2:]
        return (shape[UP][0], shape[DOWN][1], *kernel)
    if module.kind == "full":
        return shape["diff"]
    if module.kind == "norm":
        return (held["w_norm"].numel(),)
    if module.kind == "glora":
        return (shape["b1.weight"][0], shape["a1.weight"][0], *shape["b2.weight"][2:])
    if module.kind == "ia3":
        side = int(bool(held["on_input"]))
        return (*wanted[:side], held["weight"].numel(), *wanted[side + 1 :])
    if module.kind in ("oft", "boft"):
        return (shape["oft_blocks"][-3] * shape["oft_blocks"][-1], *wanted[1:])
    told = _hadamard_shape(shape) if module.kind == "loha" else _kronecker_shape(shape)
    # Both may keep a convolution's inputs and kernel in one side.
    return wanted if told == (wanted[0], math.prod(wanted[1:])) else told


def _hadamard_shape(shape: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    core = shape.get("hada_t1")
    outputs, inputs = shape["hada_w1_a"], shape["hada_w1_b"]
    return (outputs[0], inputs[1]) if core is None else (outputs[1], inputs[1], *core[2:])


def _kronecker_shape(shape: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    core = shape.get("lokr_t2")
    if "lokr_w2" in shape:
        large = shape["lokr_w2"]
    elif core is None:
        large = (shape["lokr_w2_a"][0], shape["lokr_w2_b"][1])
    else:
        large = (shape["lokr_w2_a"][1], shape["lokr_w2_b"][1], *core[2:])
    small = shape.get("lokr_w1") or (shape["lokr_w1_a"][0], shape["lokr_w1_b"][1])
    return (small[0] * large[0], small[1] * large[1], *large[2:])


def _index(sites: Iterable[Site], place: Callable[[str], Place]) -> dict[str, list[_Spot]]:
    """Every name of every layer, in all spellings."""
    index: dict[str, list[_Spot]] = {}
    bare: dict[str, list[Site]] = {}
    for site in sites:
        where = place(site.name)
        for name in (where.kohya, *_dotted(where)):
            index.setdefault(name, []).append(_Spot(site, where))
        for name in own_names(site):
            index.setdefault(name, [_Spot(site)])
        for path in _bare(site):
            bare.setdefault(f"base_model.model.{path}", []).append(site)
    for name, ones in bare.items():
        if len(ones) == 1:  # peft's names leave out the component: two encoders look alike there
            index.setdefault(name, [_Spot(ones[0])])
    return index


def own_names(site: Site) -> list[str]:
    """The names that are made of diffusers' path, under which no layers are joined."""
    path = site.name.partition(".")[2].replace(".", "_")
    names = [site.name, f"base_model.model.{site.name}"]
    if site.component.startswith("text_encoder"):
        return names
    return [*names, f"lycoris_{path}", f"lora_transformer_{path}", f"lora_unet_{path}"]


def _dotted(where: Place) -> list[str]:
    """ComfyUI's names."""
    if where.prefix == "lora_unet":
        return [f"diffusion_model.{where.path}"]
    encoders = COMFYUI_ENCODERS.get(where.prefix, ())
    return [f"text_encoders.{encoder}.transformer.{where.path}" for encoder in encoders]


COMFYUI_ENCODERS = {
    "lora_te": ("clip_l", "clip_h"),
    "lora_te1": ("clip_l",),
    "lora_te2": ("clip_g",),
    "lora_te3": ("t5xxl",),
}
"""Kohya's prefix of a text encoder -> ComfyUI's words for it; SD 1.x has clip_l, 2.x clip_h."""


def _bare(site: Site) -> list[str]:
    path = site.name.partition(".")[2]
    short = path.removeprefix("text_model.")
    return [path] if short == path else [path, short]


def _as_base_holds(module: AdapterModule, place: Place) -> AdapterModule | None:
    """What a module of a file is for one layer of the base; None where that changes nothing."""
    if place.rows is None and not place.halves_swapped:
        return module
    held = module.tensors
    if module.kind not in ("lora", "full") or kinds.MID in held:
        raise WeightsError(
            f"{module.name}: the file joins layers that are apart in the base, and {module.kind} "
            "cannot be cut into parts. Only files whose layers are apart (lycoris_…) can be used."
        )
    sided = {word: held[word] for word in (UP, "diff", "diff_b", kinds.DORA) if word in held}
    wide = len(sided[UP] if UP in sided else sided["diff"])
    if place.halves_swapped:
        return AdapterModule(
            module.name,
            {**held, **{word: side.roll(wide // 2, dims=0) for word, side in sided.items()}},
        )
    assert place.rows is not None
    first, end, total = place.rows
    if wide != total:
        raise WeightsError(
            f"{module.name}: the file's layer has {wide} outputs, the base's {total}. The LoRA was "
            "trained on another base."
        )
    cut = {word: side[first:end] for word, side in sided.items()}
    if module.kind == "lora":
        cut = _own_ranks(module, cut)
    return AdapterModule(module.name, cut) if cut else None


def _own_ranks(module: AdapterModule, cut: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ranks that these rows of `up` use; {} where they use none.

    Files that were trained with the parts apart have a block of ranks for each.
    """
    down, _, scale = module.low_rank
    used = cut[UP].flatten(1).count_nonzero(dim=0).nonzero().flatten()
    if not len(used) and kinds.DORA not in cut:
        return {}
    own = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, len(down))
    alpha = torch.tensor(scale * len(down[own]), dtype=torch.float64)
    return {**cut, DOWN: down[own], UP: cut[UP][:, own], ALPHA: alpha}


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if set(shape[2:]) <= {1} else shape


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
