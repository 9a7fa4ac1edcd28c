"""A network's parameters from a file's tensors: the inverse of each network's `export`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylora.adapt import kinds
from raylora.adapt.kinds import ALPHA, DORA, DOWN, MID, UP
from raylora.adapt.lora_file import AdapterModule
from raylora.base.errors import WeightsError
from raylora.base.site import Site

Arrays = dict[str, NDArray[np.float64]]
Held = dict[str, Tensor]
"""A module's tensors by kohya's words, float64, without alpha."""


def network_of(module: AdapterModule) -> str:
    """The network (`network.kind`) that a module of a file is of.

    Raises:
        WeightsError: raylora has no such network.
    """
    if module.kind == "lora":
        return "dora" if DORA in module.tensors else "lora"
    if DORA in module.tensors or "bm.weight" in module.tensors:
        word = DORA if DORA in module.tensors else "bm.weight"
        raise WeightsError(
            f"{module.name} is {module.kind} with {word}, which raylora merges (family.loras) and "
            "does not train or draw with otherwise."
        )
    return module.kind if module.kind in ("loha", "lokr", "oft") else "lycoris"


def parameters_of(module: AdapterModule, site: Site) -> Arrays:
    """The parameters that the network of `network_of` has at a site to do what a module does."""
    held = {word: tensor.double() for word, tensor in module.tensors.items() if word != ALPHA}
    found = _FORMS[module.kind](held, site)
    return {word: np.asarray(tensor.numpy(), dtype=np.float64) for word, tensor in found.items()}


def scale_in(module: AdapterModule, site: Site) -> float:
    """The network's scale at a site: alpha / rank; of rotations the largest norm, 0 is none."""
    if module.kind in ("oft", "boft"):
        alpha = module.tensors.get(ALPHA)
        return 0.0 if alpha is None else float(alpha) * site.outputs
    return kinds.scale_of(module.tensors)


def _low_rank(held: Held, site: Site) -> Held:
    """`down` (R, I) or (R, I, kh, kw), `up` (O, R); Tucker's three factors make such two."""
    down, up = held[DOWN], held[UP].flatten(1)
    if MID in held:
        down = torch.einsum("abhw,bi->aihw", held[MID], down.flatten(1))
    found = {"down": _flat(down, site), "up": up}
    if DORA in held:
        magnitude = held[DORA]
        columns = magnitude.dim() > 1 and len(magnitude) == 1 and site.outputs > 1
        found[DORA] = magnitude.reshape((1, -1) if columns else (-1, 1))
    return found


def _as_it_is(held: Held, site: Site) -> Held:
    return held


def _lokr(held: Held, site: Site) -> Held:
    found = {word: _flat(tensor, site) for word, tensor in held.items()}
    if site.kernel != (1, 1) and "lokr_w2_b" in found and "lokr_t2" not in found:
        rank = len(found["lokr_w2_b"])
        found["lokr_w2_b"] = found["lokr_w2_b"].reshape(rank, -1, *site.kernel)
    return found


def _rotation(held: Held, site: Site) -> Held:
    found = {"oft_blocks": held["oft_blocks"]}
    return {**found, "rescale": held["rescale"].flatten()} if "rescale" in held else found


def _glora(held: Held, site: Site) -> Held:
    small = {word: held[f"{word}.weight"].flatten(1) for word in ("a1", "a2", "b1")}
    return {**small, "b2": _flat(held["b2.weight"], site)}


def _ia3(held: Held, site: Site) -> Held:
    return {"of_inputs" if held["on_input"] else "of_outputs": held["weight"].flatten()}


def _full(held: Held, site: Site) -> Held:
    return {**held, "diff": _flat(held["diff"], site)}


def _flat(tensor: Tensor, site: Site) -> Tensor:
    """1x1 convolutions are trained as linear layers are."""
    return tensor.flatten(1) if tensor.dim() == 4 and site.kernel == (1, 1) else tensor


_FORMS: dict[str, Callable[[Held, Site], Held]] = {
    "lora": _low_rank,
    "loha": _as_it_is,
    "lokr": _lokr,
    "oft": _rotation,
    "boft": _rotation,
    "glora": _glora,
    "ia3": _ia3,
    "full": _full,
    "norm": _as_it_is,
}
