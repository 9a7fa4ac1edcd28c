"""Which units are streamed, how their weights are packed, and when they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from placed_models import chain
from torch import nn

from raylora.memory.placed import Placed
from raylora.memory.setting import Setting
from raylora.memory.stream import (
    ALIGNMENT,
    Ring,
    dense_stride,
    packing_of,
    ring_bytes,
    streamed_units,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9])
def test_streamed_units_are_evenly_spaced_by_bytes(share: float):
    sizes = [100 + 37 * (n * n % 11) for n in range(60)]
    chosen = set(streamed_units(sizes, share))
    for end in range(1, len(sizes) + 1):
        there = sum(sizes[n] for n in chosen if n < end)
        assert abs(there - share * sum(sizes[:end])) <= max(sizes) / 2 + 1


def test_no_share_streams_nothing_and_the_whole_share_everything():
    sizes = [5, 1, 9, 9, 0, 2]
    assert streamed_units(sizes, 0.0) == ()
    assert streamed_units(sizes, 1.0) == (0, 1, 2, 3, 4, 5)
    assert streamed_units([], 1.0) == ()


@pytest.mark.parametrize("size", [1, 3, 7 * 2**30 + 1])
def test_half_of_equal_units_is_every_second(size: int):
    assert streamed_units([size] * 100, 0.5) == tuple(range(0, 100, 2))


def test_a_packed_buffer_holds_every_weight_at_an_aligned_place():
    layer = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(5)  # buffers, one of them a whole number
    norm.register_buffer("wide", torch.arange(4.0).expand(3, 4))
    tied = nn.Linear(2, 2)
    twin = nn.Linear(2, 2)
    twin.weight = tied.weight
    modules = [layer, norm, tied, twin]
    before = [{**one.state_dict(keep_vars=True)} for one in modules]
    packing = packing_of(modules)
    buffer = torch.empty(packing.bytes, dtype=torch.uint8)
    packing.pack(buffer)
    views = packing.views(buffer)
    packing.put(views)
    ends = 0
    for piece in sorted(packing.pieces, key=lambda piece: piece.offset):
        assert piece.offset % ALIGNMENT == 0
        assert piece.offset >= ends or piece.held is tied.weight
        ends = piece.offset + piece.bytes
    for one, held in zip(modules, before, strict=True):
        for name, tensor in one.state_dict(keep_vars=True).items():
            assert torch.equal(tensor, held[name])
            assert tensor.dtype == held[name].dtype
            assert isinstance(tensor, nn.Parameter) == isinstance(held[name], nn.Parameter)
            assert tensor.untyped_storage()._cdata == buffer.untyped_storage()._cdata
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert twin.weight is tied.weight
    assert not layer.weight.requires_grad


def test_a_copy_keeps_strides_that_leave_no_gaps():
    plain = torch.empty(2, 3, 4, 5)
    assert dense_stride(plain) == plain.stride()
    turned = plain.permute(3, 0, 2, 1)
    assert dense_stride(turned) == turned.stride()
    assert dense_stride(plain[:, 1:]) == torch.empty(2, 2, 4, 5).stride()
    assert dense_stride(torch.empty(1).expand(3, 2)) == (2, 1)
    assert dense_stride(torch.empty(())) == ()


class Watched:
    """What a model's ring does, in order: ("copy", unit) and ("run", unit)."""

    def __init__(self, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, made = chain([16] * units)
        self.placed = Placed(self.model, made, device=CPU)
        self.events: list[tuple[str, int]] = []
        copy, bring = Ring._copy, Ring._bring_next

        def copied(ring: Ring, number: int, slot: int) -> None:
            self.events.append(("copy", number))
            copy(ring, number, slot)

        def brought(ring: Ring, number: int, *, backward: bool) -> None:
            bring(ring, number, backward=backward)
            self.events.append(("run", number))

        monkeypatch.setattr(Ring, "_copy", copied)
        monkeypatch.setattr(Ring, "_bring_next", brought)
        self.placed.apply(Setting(streamed=1.0))

    def step(self) -> None:
        x = torch.ones(2, 8, requires_grad=True)
        self.model(x).sum().backward()

    def look(self) -> None:
        with torch.no_grad():
            self.model(torch.ones(2, 8))

    def take(self) -> list[tuple[str, int]]:
        events, self.events = self.events, []
        return events


def test_a_unit_is_copied_before_the_one_in_front_of_it_runs(monkeypatch: pytest.MonkeyPatch):
    watched = Watched(6, monkeypatch)
    watched.step()
    watched.take()
    watched.step()
    events = watched.take()
    assert [n for what, n in events if what == "run"] == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    # The two that ran last are there still, at the turn and at the next step.
    assert [n for what, n in events if what == "copy"] == [2, 3, 4, 5, 3, 2, 1, 0]
    for place, (what, number) in enumerate(events):
        if what == "copy":
            behind = events[place + 1]
            assert behind in (("run", number - 1), ("run", number + 1)), "beside the one before"


def test_without_gradients_the_first_unit_comes_beside_the_last(monkeypatch: pytest.MonkeyPatch):
    watched = Watched(5, monkeypatch)
    watched.look()
    watched.take()
    watched.look()
    events = watched.take()
    assert events[-2:] == [("copy", 0), ("run", 4)]
    assert sum(what == "copy" for what, _ in events) == 5


def test_a_place_whose_copy_failed_holds_nothing(monkeypatch: pytest.MonkeyPatch):
    watched = Watched(3, monkeypatch)
    watched.look()
    ring: Any = watched.placed._ring
    (missing,) = {0, 1, 2} - {slot.holds for slot in ring._slots}
    ring._units[missing].host = ring._units[missing].host[:3]  # too few bytes
    with pytest.raises(RuntimeError):
        ring._copy(missing, 0)
    assert ring._slots[0].holds is None


@pytest.mark.parametrize(("units", "slots"), [(1, 1), (2, 2), (5, 2)])
def test_the_ring_is_as_large_as_is_said(units: int, slots: int):
    model, made = chain([16 + n for n in range(units)])
    placed = Placed(model, made, device=CPU)
    placed.apply(Setting(streamed=1.0))
    sizes = [packing_of(list(unit.module.modules())).bytes for unit in made]
    assert placed.ring_bytes == ring_bytes(sizes) == slots * max(sizes)
    assert placed.streamed_bytes == sum(sizes)
