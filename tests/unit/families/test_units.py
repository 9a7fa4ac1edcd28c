"""The blocks of every family's models: named by their paths, in the order in which they run."""

from __future__ import annotations

import pytest
import torch
from bases import open_tiny
from placed_models import open_placed
from torch import nn

from raylora.base.lookup import plugins
from raylora.base.unit import Unit

KINDS = plugins("raylora.families")
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_units_run_in_their_order_and_each_once(kind: str):
    tiny = open_placed(open_tiny(kind))
    expected: list[str] = []
    ran: list[str] = []
    models = {**tiny.encoders, tiny.family.component: tiny.denoiser}
    units = {**tiny.family.text_units(tiny.encoders), "": tiny.family.units(tiny.denoiser)}
    assert [*units] == [*tiny.encoders, ""]
    for held in units.values():
        for unit in held:
            expected.append(unit.name)
            unit.module.register_forward_pre_hook(
                lambda module, given, name=unit.name: ran.append(name)
            )
    tiny.look()
    assert [name for one in models for name in ran if name.split(".")[0] == one] == expected


@every_kind
def test_a_unit_s_name_is_its_path_and_its_mlp_lies_within(kind: str):
    family = open_tiny(kind)
    denoiser, encoders = family.skeletons()
    for component, held in family.text_units(encoders).items():
        # transformers' trees have a level that names do not, in models with a projection.
        model = encoders[component]
        _look(held, component, getattr(model, "text_model", model))
    _look(family.units(denoiser), family.component, denoiser)


def _look(units: list[Unit], component: str, model: nn.Module) -> None:
    assert units
    assert any(unit.mlp for unit in units)
    for unit in units:
        first, _, path = unit.name.partition(".")
        assert first == component
        assert model.get_submodule(path) is unit.module
        assert all(part in list(unit.module.modules()) for part in unit.mlp)


@every_kind
def test_most_of_a_model_is_in_its_units_and_no_weight_in_two(kind: str):
    family = open_tiny(kind)
    denoiser, _ = family.skeletons()
    held = [weight for unit in family.units(denoiser) for weight in unit.module.parameters()]
    assert len({id(weight) for weight in held}) == len(held)
    assert sum(one.numel() for one in held) > 0.5 * sum(
        one.numel() for one in denoiser.parameters()
    )
    assert all(weight.device == torch.device("meta") for weight in held)
