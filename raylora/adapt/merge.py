"""Making a LoRA part of a base: W + strength · change, exactly once rounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from raylora.adapt import kinds
from raylora.adapt.keys import layer_at
from raylora.adapt.lora_file import AdapterFile, AdapterModule
from raylora.adapt.onto import Names, check_sizes, onto, refuse_left
from raylora.adapt.recognise import refuse_others
from raylora.base.errors import WeightsError
from raylora.base.site import Site

Fitted = Mapping[str, AdapterModule]
"""Site name -> what a file has for that layer."""


def fitted(file: AdapterFile, sites: Iterable[Site], names: Names) -> Fitted:
    """A file's modules by the layers that they are for, all found and of the right size.

    Args:
        sites: every layer of the base (`all_sites`).

    Raises:
        WeightsError: the file is for another family, or has a layer that the base lacks or has in
            another size.
    """
    refuse_others(file, names.kind)
    every = {site.name: site for site in sites}
    found, left = onto(file, every.values(), names.place)
    refuse_left(left)
    for name, module in found.items():
        check_sizes(module, every[name])
    return found


def file_parts(modules: Fitted) -> set[str]:
    """Which models a file changes, by component."""
    return {name.partition(".")[0] for name in modules}


def merge_lora(component: str, model: nn.Module, modules: Fitted, strength: float) -> int:
    """Add strength · change to one model's weights in place, and say of how many layers.

    Each sum is taken in float64 and rounded once to the weight's dtype. What the file has of other
    models stays for those.

    Raises:
        WeightsError: a layer has no bias, and the file changes it; nothing is changed then.
    """
    layers = {
        name: layer_at(model, name) for name in modules if name.partition(".")[0] == component
    }
    for name, layer in layers.items():
        if getattr(layer, "bias", None) is None and "diff_b" in modules[name].tensors:
            raise WeightsError(f"{name}: the file changes a bias, and the base's layer has none.")
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)  # a copy, as of a packed weight, would be lost
        if weight.is_meta:
            continue
        held = weight.detach().double().cpu()
        added = kinds.change(modules[name].tensors, held)
        _add(weight, added["weight"], strength)
        if "bias" in added:
            bias = layer.bias
            assert isinstance(bias, Tensor)
            _add(bias, added["bias"], strength)
    return len(layers)


def _add(held: Tensor, added: Tensor, strength: float) -> None:
    change = added.to(held.device).reshape(held.shape)
    held.data.copy_(held.detach().double() + strength * change)
