"""Putting weights into a model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from raylora.base.errors import WeightsError

Model = TypeVar("Model", bound=nn.Module)
_NAMED = 3  # tensors that a message names


def fill(
    model: Model, weights: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device
) -> Model:
    """Give a model that was built on the meta device its weights, cast and placed one by one.

    The host holds at most the file that they are mapped from and one tensor. Weights that are on
    this device in this dtype already stay where they are: in the mapped file.

    Args:
        weights: one for each name of the model's state dict, and no others.
        dtype: of floating-point weights; others keep their own.

    Raises:
        WeightsError: names or shapes are not those that the model's config means.
    """
    expected = model.state_dict(keep_vars=True)
    _same_names(model, expected, weights)
    for name, held in expected.items():
        weight = weights[name]
        if weight.shape != held.shape:
            raise WeightsError(
                f"{type(model).__name__}: {name} has shape {list(weight.shape)}, and its config "
                f"means {list(held.shape)}. Weights and config are of different models."
            )
        kept = dtype if weight.is_floating_point() else weight.dtype
        placed = weight.to(dtype=kept, device=device).contiguous()
        path, _, word = name.rpartition(".")
        layer = model.get_submodule(path)
        if isinstance(held, nn.Parameter):
            setattr(layer, word, nn.Parameter(placed, requires_grad=held.requires_grad))
        else:
            setattr(layer, word, placed)
    meta = device.type == "meta"
    left = [name for name, held in model.named_buffers() if held.is_meta and not meta]
    assert not left, f"{type(model).__name__}: no file has {left}; make them before filling"
    return model


def _same_names(
    model: nn.Module, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    for problem, names in (
        ("lack", expected.keys() - weights.keys()),
        ("have beyond what its config means", weights.keys() - expected.keys()),
    ):
        if names:
            some = ", ".join(sorted(names)[:_NAMED])
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise WeightsError(
                f"{type(model).__name__}: the weights {problem}: {some}{more}. They are not of "
                "this model, or not whole: choose the family that fits them, or fetch them again."
            )
