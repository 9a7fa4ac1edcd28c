"""Models that visit the device: which are there at which moment, and what fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from raylora.base.unit import Unit
from raylora.memory.lending import Lending, free_on, streamed_share
from raylora.memory.options import MemoryOptions
from raylora.memory.stream import ring_bytes, streamed_units
from raylora.memory.tracker import PeakTracker

CPU = torch.device("cpu")
WIDTH = 64
LAYER_BYTES = WIDTH * WIDTH * 4


def stack(layers: int, *, made: list[str] | None = None) -> Callable[[torch.device], nn.Module]:
    """Gives the same linears each time, on a device; notes the devices."""

    def load(device: torch.device) -> nn.Module:
        if made is not None:
            made.append(device.type)
        with torch.device(device):
            model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        if device.type != "meta":
            for number, weight in enumerate(model.parameters()):
                weight.data = torch.linspace(-1, 1, WIDTH * WIDTH).view(WIDTH, WIDTH) + number
        return model.requires_grad_(False)

    return load


def units_of(component: str, model: nn.Module) -> list[Unit]:
    if component == "vae":
        return []
    return [Unit(f"{component}.{name}", layer) for name, layer in model.named_children()]


@contextmanager
def lent(lending: Lending, component: str, layers: int, work_bytes: int = 0) -> Iterator[nn.Module]:
    with lending.lend(component, stack(layers), work_bytes=work_bytes) as model:
        yield model


def test_one_model_is_there_at_a_time_and_stays_until_the_next():
    made: list[str] = []
    lending = Lending(CPU, units_of)
    for component in ("vae", "vae", "text_encoder", "vae"):
        with lending.lend(component, stack(2, made=made)):
            assert list(lending._visiting) == [component]
    assert made == ["cpu"] * 3
    lending.clear()
    assert not lending._visiting


def test_what_is_kept_stays_through_others_and_clearing():
    made: list[str] = []
    lending = Lending(CPU, units_of, keep=True)
    for component in ("vae", "text_encoder", "vae", "text_encoder"):
        with lending.lend(component, stack(2, made=made)):
            pass
        lending.clear()
    assert made == ["cpu"] * 2
    lending.close()
    assert not lending._visiting


@pytest.mark.parametrize(
    ("component", "free_layers", "work_layers", "streamed"),
    [
        ("text_encoder", 8, 0, 0),
        ("text_encoder", 9, 2, 4),
        ("text_encoder", 7, 0, 4),
        ("text_encoder", 1, 0, 8),
        ("vae", 1, 0, 0),
    ],
)
def test_what_does_not_fit_beside_its_work_is_streamed_and_gives_the_same_bits(
    component: str, free_layers: int, work_layers: int, streamed: int
):
    lending = Lending(CPU, units_of, free_bytes=lambda: free_layers * LAYER_BYTES)
    given = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
    expected = stack(8)(CPU)(given)
    with lent(lending, component, 8, work_layers * LAYER_BYTES) as model:
        placed = lending._visiting[component].placed
        assert torch.equal(model(given), expected)
    assert (len(placed.streamed) if placed else 0) == streamed


def test_what_streams_in_part_holds_no_more_than_is_free():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        sizes = torch.randint(1, 100, (12,), generator=generator).tolist()
        others = int(torch.randint(0, 200, (1,), generator=generator))
        whole, free = sum(sizes) + others, int(torch.randint(0, 900, (1,), generator=generator))
        share = streamed_share(whole, sizes, free)
        away = streamed_units(sizes, share)
        held = whole - sum(sizes[one] for one in away) + ring_bytes([sizes[one] for one in away])
        assert share == 1 or held <= free, (sizes, others, free)


def test_out_of_memory_leaves_nothing_behind():
    lending = Lending(CPU, units_of)
    with pytest.raises(torch.OutOfMemoryError), lent(lending, "vae", 2):
        raise torch.OutOfMemoryError("full")
    assert not lending._visiting


@pytest.mark.parametrize(("layers", "there"), [(4, 4), (40, 7)])
def test_a_budget_counts_what_lies_on_the_device_alone(layers: int, there: int):
    budget = PeakTracker(limit_bytes=8 * LAYER_BYTES)
    free = free_on(CPU, MemoryOptions(reserve_gib=0), budget)
    lending = Lending(CPU, units_of, free_bytes=free, budget=budget)
    with budget, lent(lending, "text_encoder", layers) as model:
        assert budget.now_bytes == there * LAYER_BYTES, "all layers, or some and the ring"
        assert free() == (8 - there) * LAYER_BYTES
        said = lending.aside(model(torch.ones(1, WIDTH)))
        assert budget.now_bytes == there * LAYER_BYTES, "what is put aside does not count"
        assert said.shape == (1, WIDTH)
    lending.clear()
    del model
    assert budget.now_bytes == 0


def test_a_cpu_without_a_budget_has_no_limit():
    assert free_on(CPU, MemoryOptions())() == float("inf")
