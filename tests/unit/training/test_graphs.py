"""What is recorded, kept, played and given up; a GPU's recordings are played by plain functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from raylora.memory.setting import Setting
from raylora.training import graphs as module
from raylora.training.fitting import Fitting
from raylora.training.graphs import MOST, Graphs


class Played:
    """Stands for a recording."""

    def __init__(self, compute: Any) -> None:
        self.play = compute


class Fake(Graphs):
    """Records by keeping the function; `wrong` is added to what a recording's gradients are."""

    def __init__(self, gradients: Tensor, wrong: float = 0.0, loss_off: float = 0.0) -> None:
        super().__init__(possible=True, gradients=gradients)
        self.wrong, self.loss_off = wrong, loss_off
        self.recorded = self.played = 0
        self.room = True

    def _record(self, given: Any, compute: Any) -> Any:
        if not self.room:
            raise torch.OutOfMemoryError("no room")
        self.recorded += 1
        self._bytes += 100

        def play(given: Mapping[str, Tensor]) -> Tensor:
            self.played += 1
            losses: Tensor = compute(given)
            self._gradients += self.wrong  # type: ignore[operator]
            return losses + self.loss_off

        return Played(play)


class Run:
    """A step's micro-batches: gradients are the sum of what is given, twice it the loss."""

    def __init__(self, **words: Any) -> None:
        self.gradients = torch.zeros(4)
        self.graphs = Fake(self.gradients, **words)
        self.plain = 0

    def step(self, size: int = 4, key: object = 1.0, value: float = 1.0) -> Tensor:
        self.gradients.zero_()
        return self.add(size, key, value)

    def add(self, size: int = 4, key: object = 1.0, value: float = 1.0) -> Tensor:
        before = self.graphs.played
        losses = self.graphs.compute(key, {"x": torch.full((size,), value)}, self._compute)
        self.plain += self.graphs.played == before
        return losses

    def _compute(self, given: Mapping[str, Tensor]) -> Tensor:
        self.gradients += given["x"].sum()
        return 2 * given["x"]


def test_the_third_micro_batch_of_a_shape_is_recorded_and_those_after_it_are_played():
    run = Run()
    seen = []
    for number in range(5):
        losses = run.step(value=float(number + 1))
        assert torch.equal(losses, torch.full((4,), 2.0 * (number + 1)))
        assert torch.equal(run.gradients, torch.full((4,), 4.0 * (number + 1)))
        seen.append((run.graphs.recorded, run.graphs.played))
    assert seen == [(0, 0), (0, 0), (1, 1), (1, 2), (1, 3)]


def test_what_was_added_before_stays_when_a_later_micro_batch_is_recorded():
    run = Run()
    for _ in range(2):
        run.step()
    run.step(size=2)
    run.add()  # the third of its shape, on top of another
    assert torch.equal(run.gradients, torch.full((4,), 6.0))
    assert run.graphs.count == 1


@pytest.mark.parametrize("wrong", [{"wrong": 1.0}, {"wrong": math.nan}, {"loss_off": 1.0}])
def test_a_recording_that_gives_something_else_is_not_kept_and_none_is_made_again(
    wrong: dict[str, float],
):
    run = Run(**wrong)
    for _ in range(6):
        losses = run.step()
        assert torch.equal(losses, torch.full((4,), 2.0))
        assert torch.equal(run.gradients, torch.full((4,), 4.0))
    run.graphs.apply(Setting("all"))
    for _ in range(6):
        run.step()
    assert (run.graphs.recorded, run.graphs.count, run.graphs.possible) == (1, 0, False)


def test_a_micro_batch_without_a_gradient_is_recorded_too():
    run = Run()
    for _ in range(4):
        run.step(value=0.0)
    assert run.graphs.count == 1


def test_a_micro_batch_that_is_not_finite_shows_nothing_and_the_next_one_may():
    run = Run()
    for _ in range(2):
        run.step()
    run.step(value=math.inf)
    assert (run.graphs.count, run.graphs.possible) == (0, True)
    run.step()
    assert run.graphs.count == 1


def test_shapes_beyond_the_most_are_computed_plainly_and_push_none_out():
    run = Run()
    for _ in range(4):
        for size in range(1, MOST + 3):
            run.step(size)
    assert (run.graphs.recorded, run.graphs.count) == (MOST, MOST)


def test_what_was_recorded_under_another_key_is_not_played():
    run = Run()
    for _ in range(4):
        run.step(key=1.0)
    assert (run.graphs.recorded, run.graphs.played) == (1, 2)
    for recorded, key in ((2, 2.0), (3, 1.0)):
        run.step(key=key)
        assert (run.graphs.recorded, run.graphs.count) == (recorded, 1)


def test_another_setting_begins_anew_and_one_that_offloads_records_nothing():
    run = Run()
    for _ in range(3):
        run.step()
    run.graphs.apply(Setting("all", offload=True))
    for _ in range(4):
        run.step()
    assert (run.graphs.recorded, run.graphs.count) == (1, 0)
    run.graphs.apply(Setting("all"))
    for _ in range(2):
        run.step()
    assert run.graphs.recorded == 1
    run.step()
    assert run.graphs.recorded == 2


def test_where_a_recording_has_no_room_the_step_is_right_and_goes_on_plainly():
    run = Run()
    run.graphs.room = False
    for _ in range(5):
        losses = run.step()
        assert torch.equal(losses, torch.full((4,), 2.0))
        assert torch.equal(run.gradients, torch.full((4,), 4.0))
    assert (run.graphs.on, run.graphs.possible) == (False, True)


def test_memory_that_runs_out_takes_recordings_before_a_strategy_is_added():
    run = Run()
    for _ in range(3):
        run.step()
    fitting = Fitting(Setting(), limited=True)
    fitting.take([run.graphs])
    fitting.spare(run.graphs.give_up)
    for _ in range(3):
        run.step()
    assert run.graphs.count == 1

    def fits_beside_nothing() -> str:
        if run.graphs.count:
            raise torch.OutOfMemoryError("beside it")
        return "done"

    assert fitting.again(fits_beside_nothing, "a move") == "done"
    assert fitting.setting == Setting()
    for _ in range(5):
        run.step()
    assert run.graphs.count == 0, "it would run out again"


@pytest.mark.parametrize(("left", "count"), [(199, 0), (200, 1)])
def test_recordings_make_room_where_less_is_left_than_they_hold(
    left: int, count: int, monkeypatch: pytest.MonkeyPatch
):
    run = Run()
    for _ in range(3):
        run.step()
    monkeypatch.setattr(module, "_left_bytes", lambda: left)  # what they hold, 100, is of it
    run.graphs.make_room()
    assert run.graphs.count == count
