"""Following the bytes that live tensors hold."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raylora.memory.host import host_tensor
from raylora.memory.need import Line
from raylora.memory.tracker import Amount, PeakTracker, curve_at

MANY, WIDE = 10007, 1009


def test_what_is_made_is_counted_until_it_is_freed() -> None:
    with PeakTracker() as tracker:
        one = torch.ones(1000)
        other = one * 2
        assert tracker.now_bytes == 2 * 4096  # 4000 bytes each, in blocks of 512
        del one
        assert tracker.now_bytes == 4096
    del other
    assert tracker.now_bytes == 0
    assert tracker.peak_bytes == 2 * 4096


def test_views_and_changes_in_place_take_nothing() -> None:
    with PeakTracker() as tracker:
        one = torch.zeros(64, 64)
        held = tracker.now_bytes
        views = [one.t(), one[3], one.view(-1), one.detach()]
        one.add_(1).mul_(2)
        assert tracker.now_bytes == held
        del one
        assert tracker.now_bytes == held  # they still hold it
        del views
        assert tracker.now_bytes == 0


def test_what_was_made_before_counts_once_it_is_added_and_only_once() -> None:
    weight = torch.zeros(1024)
    with PeakTracker() as tracker:
        view = weight[:5]
        assert tracker.now_bytes == 0
        tracker.add([weight, view, weight.view(2, -1)])
        assert tracker.now_bytes == 4096


def test_host_memory_does_not_count() -> None:
    with PeakTracker() as tracker:
        waiting = host_tensor((1024,), torch.float32)
        waiting.copy_(torch.ones(1024))
        assert tracker.now_bytes == 0


def test_beyond_the_limit_memory_runs_out_and_nothing_more_is_held() -> None:
    with PeakTracker(limit_bytes=10 * 1024) as tracker:
        one = torch.zeros(2048)
        with pytest.raises(torch.OutOfMemoryError, match="8192 bytes are asked for, 8192 are held"):
            one + 1
        assert tracker.now_bytes == 8192
        del one
        torch.zeros(2048)
    assert tracker.peak_bytes == 8192


def test_tensors_that_only_hold_one_another_are_given_up_before_memory_runs_out() -> None:
    gc.disable()
    try:
        with PeakTracker(limit_bytes=10 * 1024):
            ring: list[object] = [torch.zeros(2048)]
            ring.append(ring)
            del ring
            torch.zeros(2048)
    finally:
        gc.enable()


def test_begin_looks_at_what_follows_alone() -> None:
    with PeakTracker() as tracker:
        torch.zeros(4096)
        kept = torch.zeros(1024)
        tracker.begin()
        assert tracker.peak_bytes == 4096
        torch.zeros(512)
    assert tracker.peak_bytes == 4096 + 2048
    del kept


class Halves(nn.Module):
    """Two halves of some rank over a wider layer, in sizes that fill whole blocks."""

    def __init__(self, rank: int, device: str) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(128, rank * 128, device=device))
        self.up = nn.Parameter(torch.zeros(rank * 128, 128, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.down).relu() @ self.up).sin()


def step(rank: int, images: int, device: str, tracker: PeakTracker) -> None:
    net = Halves(rank, device)
    x = torch.zeros(images, 128, device=device)
    net(x).sum().backward()  # gradients are made once before
    with tracker:
        tracker.add([x, *net.parameters(), *(one.grad for one in net.parameters())])  # type: ignore[misc]
        tracker.begin()
        net(net(x)).square().sum().backward()


def test_one_run_without_numbers_says_what_any_batch_at_any_rank_holds() -> None:
    told = PeakTracker(MANY, rank=WIDE, device="meta")
    step(WIDE, MANY, "meta", told)
    for rank, images in ((1, 1), (1, 8), (5, 3), (64, 2), (2, 200)):
        real = PeakTracker()
        step(rank, images, "cpu", real)
        expected = real.peak_bytes - real.before_bytes
        found = curve_at(told.moments(), rank).at(images)
        # Nothing but the loss and the odd bytes of small tensors is rounded otherwise.
        assert expected <= found <= expected + 4 * 512


LINES = st.lists(st.tuples(st.integers(-50, 900), st.integers(-5, 90)), min_size=1, max_size=12)


@given(LINES, st.integers(1, 100))
def test_a_curve_is_the_fullest_of_its_moments_for_every_number_of_images(
    lines: list[tuple[int, int]], images: int
) -> None:
    curve = curve_at([Amount(*line) for line in lines], 0)
    assert curve.at(images) == max(Line(*line).at(images) for line in lines)
