"""States on the host: the same steps, whatever the optimizer, and the same checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from least_squares import Problem, each
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raylora.optim.host_states import HostStates, moved
from raylora.optim.kinds import KINDS
from raylora.optim.optimizers import OptimizerOptions
from raylora.optim.state import flatten, restore, shown_values

HOST, DEVICE = SimpleNamespace(host_states=True), SimpleNamespace(host_states=False)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes': nothing is paged on a CPU
        yield


def steady(step: int) -> float:
    return 1.0


@pytest.mark.parametrize("name", each([*KINDS, "torch.optim:NAdam"]))
def test_an_optimizer_on_the_host_moves_bit_for_bit_as_on_the_device(name: str):
    options = OptimizerOptions(name=name)
    plain, host = Problem(options), Problem(options)
    states = HostStates(host.optimizer)
    plain.move(range(8), steady)
    host.move(range(2), steady)
    states.apply(HOST)  # in the middle of a run, as after running out of memory
    host.move(range(2, 5), steady)
    states.apply(DEVICE)
    host.move(range(5, 6), steady)
    states.apply(HOST)
    host.move(range(6, 8), steady)
    for one, other in zip(plain.values(), host.values(), strict=True):
        assert torch.equal(one, other)
    assert all(a is b for a, b in zip(moved(host.optimizer), host.leaves, strict=True))


@pytest.mark.parametrize("name", each(["adamw", "prodigy", "adamw8bit", "adamw_schedule_free"]))
def test_a_checkpoint_does_not_tell_where_it_was_made(name: str):
    options = OptimizerOptions(name=name)
    plain, host = Problem(options), Problem(options)
    states = HostStates(host.optimizer)
    states.apply(HOST)
    for one in (plain, host):
        one.move(range(3), steady)
    (tensors, facts), (theirs, their_facts) = flatten(plain.optimizer), flatten(host.optimizer)
    assert facts == their_facts
    assert tensors.keys() == theirs.keys()
    for word, tensor in tensors.items():
        assert torch.equal(tensor, theirs[word]), word
        assert tensor.dtype == theirs[word].dtype
    resumed = Problem(options, host.values())
    HostStates(resumed.optimizer).apply(HOST)
    restore(resumed.optimizer, tensors, facts)
    for one in (plain, resumed):
        one.move(range(3, 6), steady)
    for one, other in zip(plain.values(), resumed.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", each([name for name, kind in KINDS.items() if kind.schedule_free]))
def test_what_people_get_of_a_schedule_free_optimizer_is_the_same(name: str):
    found = []
    for setting in (DEVICE, HOST):
        one = Problem(OptimizerOptions(name=name))
        HostStates(one.optimizer).apply(setting)
        one.move(range(8), steady)
        before = one.values()
        with shown_values(one.optimizer):
            found.append(one.values())
        for value, held in zip(one.values(), before, strict=True):
            assert torch.equal(value, held)
        assert any(not torch.equal(a, b) for a, b in zip(found[-1], before, strict=True))
    for shown, other in zip(*found, strict=True):
        assert torch.equal(shown, other)


def test_values_that_were_changed_between_steps_are_moved_from_where_they_are():
    options = OptimizerOptions()
    plain, host = Problem(options), Problem(options)
    HostStates(host.optimizer).apply(HOST)
    for one in (plain, host):
        one.move(range(1), steady)
        with torch.no_grad():
            one.leaves[0] *= 0.5  # as a cap does
        one.move(range(1, 2), steady)
    assert torch.equal(plain.values()[0], host.values()[0])


def test_a_part_that_is_left_out_of_a_step_does_not_move_in_it():
    one = Problem(OptimizerOptions())
    HostStates(one.optimizer).apply(HOST)
    one.move(range(1), steady)
    before = one.values()
    for parameter in one.optimizer.param_groups[0]["params"]:
        parameter.grad = None  # as `leave_out` does before every step
    one.optimizer.step()
    between = one.values()
    assert torch.equal(between[0], before[0])
    assert not torch.equal(between[1], before[1])
    one.optimizer.step()
    assert not torch.equal(one.values()[0], between[0])


class Made(TorchDispatchMode):
    """Counts the largest number of numbers that an operation gives, as what follows memory sees."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = func(*args, **(kwargs or {}))
        if isinstance(given, Tensor):
            self.most = max(self.most, given.numel())
        return given


def test_what_is_made_on_the_host_is_not_seen_by_what_follows_device_memory():
    marked: list[Tensor] = []

    def mark(held: Tensor) -> Tensor:
        marked.append(held)
        return held

    seen = {}
    for setting in (DEVICE, HOST):
        one = Problem(OptimizerOptions(name="lion"))
        one.move(range(1), steady)
        states = HostStates(one.optimizer, mark)
        one.optimizer.state.clear()
        with Made() as made:
            states.apply(setting)
            one.optimizer.step()
        seen[setting.host_states] = made.most
    assert seen[False] == 8 * 640  # lion's momentum
    assert seen[True] == 8 * 640  # the parameter itself, which is copied back
    held = {id(tensor) for tensor in marked}
    assert {id(s["exp_avg"]) for s in one.optimizer.state.values()} <= held
