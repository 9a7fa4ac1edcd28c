"""Layers of loaded models as places for an adapter; what every model's list of sites is made of."""

from __future__ import annotations

from typing import Any

from torch import nn

from raylora.base.errors import WeightsError
from raylora.base.site import Role, Site


def site_of(
    name: str,
    module: nn.Module,
    *,
    role: Role = "attention",
    section: str = "",
    number: int = 0,
    block: int | None = None,
) -> Site | None:
    """The place that a layer is; None where no adapter can sit.

    Linears, convolutions and normalisations with a weight of their own; the latter have the role
    "norm", whatever `role` says of the layers around them.
    """
    words: dict[str, Any] = {"section": section, "number": number, "block": block}
    words["bias"] = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        return Site(name, "linear", module.in_features, module.out_features, role=role, **words)
    if isinstance(module, nn.Conv2d):
        assert isinstance(module.padding, tuple)
        return Site(
            name,
            "conv",
            module.in_channels,
            module.out_channels,
            kernel=_pair(module.kernel_size),
            stride=_pair(module.stride),
            padding=_pair(module.padding),
            role=role,
            **words,
        )
    if is_norm(module):
        width = int(module.weight.numel())  # type: ignore[operator]
        return Site(name, "norm", width, width, role="norm", **words)
    return None


def is_norm(module: nn.Module) -> bool:
    """A normalisation that scales with a weight; diffusers and transformers have classes of it."""
    names = ("RMSNorm", "T5LayerNorm")
    named_so = isinstance(module, nn.GroupNorm | nn.LayerNorm) or type(module).__name__.endswith(
        names
    )
    return named_so and getattr(module, "weight", None) is not None


def expect_layers(model: str, found: int, wanted: int) -> None:
    """A library that names its classes anew must not shrink the adapter without a word.

    Args:
        model: what the model is called in the sentence, e.g. "UNet".
        wanted: what the model's config means.

    Raises:
        WeightsError: the two differ.
    """
    if found != wanted:
        raise WeightsError(
            f"the {model} has {found} layers to train, and its config means {wanted}. The "
            "installed diffusers or transformers builds it otherwise: install the versions that "
            "raylora's pyproject.toml names."
        )


def _pair(sides: tuple[int, ...]) -> tuple[int, int]:
    height, width = sides
    return height, width
