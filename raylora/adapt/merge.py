"""Making a LoRA part of a base: W + strength · ΔW, exactly once rounded."""

from __future__ import annotations

from torch import Tensor, nn

from raylora.adapt.keys import component_of, layers_by_file_name
from raylora.adapt.lora_file import AdapterFile, AdapterModule
from raylora.base.errors import WeightsError


def file_parts(file: AdapterFile) -> set[str]:
    """Which models a file changes: "unet", "text_encoder" or both.

    Raises:
        WeightsError: a module of it is in neither, as in a file for SDXL or FLUX.
    """
    return {component_of(name) for name in file.modules}


def merge_lora(component: str, model: nn.Module, file: AdapterFile, strength: float) -> int:
    """Add strength · ΔW to one model's weights in place, and say of how many layers.

    Each sum is taken in float64 and rounded once to the weight's dtype. What the file has of other
    models stays for those.

    Raises:
        WeightsError: the model lacks a layer of the file, or has it in another size; nothing is
            changed then.
    """
    layers = layers_by_file_name(component, model)
    found = {
        name: _weight(module, layers.get(name))
        for name, module in file.modules.items()
        if component_of(name) == component
    }
    for name, weight in found.items():
        change = file.delta(name).to(weight.device).reshape(weight.shape)
        weight.data.copy_(weight.detach().double() + strength * change)
    return len(found)


def _weight(module: AdapterModule, layer: nn.Module | None) -> Tensor:
    """The weight that a module changes."""
    if layer is None:
        raise WeightsError(
            f"{module.name}: the base has no such layer. The LoRA is for another family."
        )
    weight = layer.weight
    assert isinstance(weight, Tensor)
    down, up, _ = module.low_rank
    shape = (up.shape[0], *down.shape[1:])
    # A 1x1 convolution and a linear layer are the same; bases were saved with either.
    if _without_ones(shape) != _without_ones(tuple(weight.shape)):
        raise WeightsError(
            f"{module.name} is for a weight of shape {shape}, and the base has "
            f"{tuple(weight.shape)} there: the LoRA was trained on another base."
        )
    return weight


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if set(shape[2:]) <= {1} else shape
