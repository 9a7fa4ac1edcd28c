"""What waits on the host: which inputs go, that they leave the device, and that they come back."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from placed_models import chain
from torch import Tensor

from raylora.memory import offload
from raylora.memory.host import lies_on_host
from raylora.memory.offload import Offload
from raylora.memory.placed import Placed
from raylora.memory.setting import Setting
from raylora.memory.tracker import PeakTracker

CPU = torch.device("cpu")


def numbers(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_(True) * 1


def test_inputs_come_back_as_they_were():
    plain = numbers(2, 3, 4, 5)
    inputs = [
        plain,
        plain.to(memory_format=torch.channels_last),
        plain[:, 1:, ::2],
        plain.to(torch.bfloat16),
        plain.permute(3, 0, 1, 2),
    ]
    away, kept = Offload(CPU).take(inputs)
    assert kept == [None] * len(inputs)
    assert all(one is given for one, given in zip(away.filled(kept), inputs, strict=True))
    for _ in range(2):
        for back, given in zip(away.filled(kept), inputs, strict=True):
            assert torch.equal(back, given)
            assert back.dtype == given.dtype
            assert back.requires_grad
            assert not lies_on_host(back.untyped_storage())
    assert away.filled(kept)[1].is_contiguous(memory_format=torch.channels_last)
    assert away.filled(kept)[4].stride() == plain.permute(3, 0, 1, 2).stride()


def test_what_is_not_of_the_graph_or_of_several_units_stays():
    shared, frozen, own = numbers(3), torch.ones(3), numbers(3)
    keeps = Offload(CPU)
    _, first = keeps.take([own, frozen, shared, None, 3])
    assert first == [None, frozen, None, None, 3]
    _, second = keeps.take([numbers(3), frozen, shared])
    assert second[0] is None
    assert second[1] is frozen
    assert second[2] is shared, "once on the host is enough"


def test_what_lies_on_another_device_stays():
    there = torch.empty(3, device="meta", requires_grad=True)
    _, kept = Offload(CPU).take([there])
    assert kept[0] is there


def test_the_device_s_copy_goes_after_the_forward_pass():
    model, units = chain([16, 24, 32])
    Placed(model, units, device=CPU).apply(Setting("all", offload=True))
    inputs: list[weakref.ref[Tensor]] = []
    for unit in units:
        unit.module.register_forward_pre_hook(
            lambda module, given: inputs.append(weakref.ref(given[0]))
        )
    y = model(numbers(3, 8))
    gc.collect()
    assert len(inputs) == 3
    assert [one() for one in inputs] == [None] * 3
    y.sum().backward()


def test_less_is_held_at_once():
    peaks = []
    for setting in (Setting("all"), Setting("all", offload=True)):
        model, units = chain([8] * 12)
        Placed(model, units, device=CPU).apply(setting)
        with PeakTracker() as tracker:
            x = numbers(640, 8)
            tracker.begin()
            model(x).sum().backward()
        peaks.append(tracker.peak_bytes - x.nbytes)
    unit = 640 * 8 * 4
    assert peaks[1] <= peaks[0] - 8 * unit


def test_the_inputs_of_the_unit_in_front_come_beside_the_one_that_is_computed_again(
    monkeypatch: Any,
):
    model, units = chain([8] * 4)
    placed = Placed(model, units, device=CPU)
    placed.apply(Setting("all", offload=True))
    events: list[str] = []
    bring = offload.Away._bring_back

    def brought(away: offload.Away) -> None:
        if away._back is None:
            events.append("comes")
        bring(away)

    y = model(numbers(3, 8))
    monkeypatch.setattr(offload.Away, "_bring_back", brought)
    for unit in units:
        unit.module.norm.register_forward_pre_hook(lambda *_: events.append("runs"))  # type: ignore[operator, union-attr]
    y.sum().backward()
    # The last unit's own and those of the one in front of it, then one ahead; the first has none.
    assert events == ["comes", "comes", "runs", "comes", "runs", "comes", "runs", "runs"]


def test_the_host_holds_as_much_as_is_away_at_once_whatever_the_sizes():
    model, units = chain([8] * 4)
    placed = Placed(model, units, device=CPU)
    placed.apply(Setting("all", offload=True))
    for rows in (3, 5, 4, 9, 2, 9, 3):
        for _ in range(2):
            model(numbers(rows, 8)).sum().backward()
    gc.collect()
    assert placed._offload is not None
    memory = placed._offload.places._memory
    assert memory.bytes == 4 * 9 * 8 * 4
    placed.apply(Setting("all"))
    assert memory.bytes == 0
