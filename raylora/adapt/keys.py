"""The three names of one layer in SD 1.x and 2.x: raylora's own, the LoRA file's, and diffusers'.

    raylora    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0
    LoRA file  lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0
    diffusers  unet.down_blocks.0.….attn1.to_out.0.lora_A.weight (down), .lora_B.weight (up)

raylora's name is the path in diffusers' model behind the component. A text encoder's path always
begins with `text_model.`, whether or not the installed transformers has that level (5.x: no).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn

from raylora.base.errors import WeightsError

Half = Literal["down", "up"]
Naming = Literal["kohya", "diffusers"]
"""Whose names a LoRA file uses: `lora_unet_…`, or `unet.….lora_A.weight`."""

_KOHYA_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_PEFT_HALF: dict[Half, str] = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
_TEXT_LEVEL = "text_model."


def module_name(component: str, path: str) -> str:
    """raylora's name of the layer at `path` within a loaded component ("unet", "text_encoder")."""
    if component == "text_encoder" and not path.startswith(_TEXT_LEVEL):
        path = _TEXT_LEVEL + path
    return f"{component}.{path}"


def module_names(component: str, model: nn.Module) -> list[str]:
    """Names of all layers of a component that an adapter can sit on (linear and convolution)."""
    return [
        module_name(component, path)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]


def layers_by_file_name(component: str, model: nn.Module) -> dict[str, nn.Module]:
    """A component's layers that an adapter can sit on, by the name that a LoRA file uses."""
    return {
        kohya_name(module_name(component, path)): layer
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def find_module(components: Mapping[str, nn.Module], name: str) -> nn.Module:
    """The layer of that name in loaded components, with or without a `text_model.` level.

    Raises:
        WeightsError: no such component or layer.
    """
    component, _, path = name.partition(".")
    layers: dict[str, nn.Module] = {}
    if component in components:
        layers = dict(components[component].named_modules())
    layer = layers.get(path) or layers.get(path.removeprefix(_TEXT_LEVEL))
    if layer is None:
        raise WeightsError(f"{name}: the base has no such layer. The LoRA is for another family.")
    return layer


def layer_at(model: nn.Module, name: str) -> nn.Module:
    """The layer of raylora's name in the model that its component is, whatever its levels."""
    path = name.partition(".")[2]
    try:
        return model.get_submodule(path)
    except AttributeError:
        return model.get_submodule(path.removeprefix(_TEXT_LEVEL))


def kohya_name(name: str) -> str:
    """The name a LoRA file uses; one that is a file's name already comes back as it is.

    Raises:
        WeightsError: the component is not one that SD 1.x and 2.x files know.
    """
    if name.startswith(tuple(_KOHYA_PREFIX.values())):
        return name
    component, _, path = name.partition(".")
    if component not in _KOHYA_PREFIX or not path:
        raise WeightsError(
            f"{name}: LoRA files have no name for it. Names begin with one of "
            f"{', '.join(f'{word}.' for word in _KOHYA_PREFIX)}"
        )
    return _KOHYA_PREFIX[component] + path.replace(".", "_")


def kohya_to_module(name: str, known_modules: Iterable[str]) -> str:
    """raylora's name of a layer from its name in a LoRA file.

    Dots and underscores look alike there, so the answer is looked up among the names of the layers
    that the base has (`module_names`).

    Raises:
        WeightsError: none of them has that name.
    """
    by_kohya = {kohya_name(module): module for module in known_modules}
    if name not in by_kohya:
        raise WeightsError(f"{name}: the base has no such layer. The LoRA is for another family.")
    return by_kohya[name]


def peft_key(name: str, half: Half) -> str:
    """The key of one half in a file of diffusers' own naming."""
    return name + _PEFT_HALF[half]


def is_peft_key(key: str) -> bool:
    """Whether it is half of a module in a file of diffusers' own naming."""
    ending = next((ending for ending in _PEFT_HALF.values() if key.endswith(ending)), None)
    if ending is None:
        return False
    component, _, path = key.removesuffix(ending).partition(".")
    return component in _KOHYA_PREFIX and path != ""


def component_of(name: str) -> str:
    """Which model a layer is in, "unet" or "text_encoder", from either kind of name.

    Raises:
        WeightsError: neither, as in a file for SDXL or FLUX.
    """
    for component, prefix in _KOHYA_PREFIX.items():
        if name.startswith((f"{component}.", prefix)):
            return component
    raise WeightsError(
        f"{name}: no layer of Stable Diffusion 1.x or 2.x. The LoRA is for another family."
    )


def split_peft_key(key: str) -> tuple[str, Half]:
    """Layer and half from a key of diffusers' own naming.

    Raises:
        WeightsError: the key ends otherwise.
    """
    for half, ending in _PEFT_HALF.items():
        if key.endswith(ending):
            return key.removesuffix(ending), half
    raise WeightsError(
        f"{key}: not half of a LoRA, which ends with .lora_A.weight or .lora_B.weight."
    )
