"""Memory may run out anywhere in a run: the LoRA is what it would have been, and events say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import MakeJob, final_state, open_run
from torch import Tensor

from raylora.assemble import open_store
from raylora.base.errors import MemoryPlanError
from raylora.base.segments import read_segments
from raylora.job import Job
from raylora.memory.options import MemoryOptions
from raylora.memory.setting import Setting
from raylora.training.fitting import Fitting
from raylora.training.loop import Run, run_training

ROOM = {"memory__budget_gib": 1.0, "memory__reserve_gib": 0.25, "training__steps": 3}


def once(at: int) -> Callable[[], None]:
    """Raises at one call, counted from 1."""
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("a test's")

    return check


def in_forward(run: Run, at: int) -> None:
    predict, check = run.parts.predict, once(at)

    def limited(*given: Any) -> Tensor:
        check()
        return predict(*given)

    run.parts.predict = limited


def in_backward(run: Run, at: int) -> None:
    predict, check = run.parts.predict, once(at)

    def limited(*given: Any) -> Tensor:
        found = predict(*given)
        if found.requires_grad:
            found.register_hook(lambda gradient: check())
        return found

    run.parts.predict = limited


def after_moving(run: Run, at: int) -> None:
    optimizer, check = run.parts.mover.optimizer, once(at)
    step = optimizer.step

    def limited() -> None:
        step()
        check()

    optimizer.step = limited  # type: ignore[method-assign]


def in_the_average(run: Run, at: int) -> None:
    assert run.parts.ema
    update, check = run.parts.ema.update, once(at)

    def limited(done: int) -> None:
        check()
        update(done)

    run.parts.ema.update = limited  # type: ignore[method-assign]


def in_saving(run: Run, at: int) -> None:
    assert run.saver
    file, check = run.saver.file, once(at)

    def limited(*given: Any) -> bytes:
        check()
        return file(*given)

    run.saver.file = limited  # type: ignore[method-assign]


def trained(job: Job, disturb: Callable[[Run], None] = lambda run: None) -> Run:
    run = open_run(job, report=True)
    run.trial = None  # which has tests of its own
    try:
        disturb(run)
        run_training(run)
    finally:
        run.close()
    return run


def told(job: Job) -> list[dict[str, Any]]:
    events = read_segments(open_store(job), "events")
    return [row for row in events if row["event"] == "out of memory"]


IMAGES = 4  # of a step, one at a time
WHERE: dict[str, tuple[Callable[[Run, int], None], int, str]] = {
    # The held-out loss of 1 image at 4 timesteps comes before the first step.
    "the first step": (in_forward, 4 + 1, "step 1"),
    "a later step": (in_forward, 4 + IMAGES + 3, "step 2"),
    "the first backward pass": (in_backward, 1, "step 1"),
    "a later backward pass": (in_backward, IMAGES + 2, "step 2"),
    "the first move": (after_moving, 1, "the end of step 1"),
    "a later move": (after_moving, 2, "the end of step 2"),
    "the average": (in_the_average, 2, "the end of step 2"),
    "measuring": (in_forward, 3, "the held-out loss"),
    "saving": (in_saving, 1, "the file of step 3"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("word", WHERE)
def test_nothing_is_lost_wherever_memory_runs_out(
    word: str, make_job: MakeJob, one_icon: str, undisturbed: dict[str, Any]
):
    disturb, at, where = WHERE[word]
    more = {
        "training__sums": "exact",
        "ema__decay": 0.9,
        "validation__folder": one_icon,
        "optimizer__weight_decay": 0.1,
        "schedule__warmup_steps": 0,
        **ROOM,
    }
    if not undisturbed:
        plain = make_job(name="plain", **more)
        trained(plain)
        assert told(plain) == []
        undisturbed.update(final_state(plain))
    job = make_job(name="disturbed", **more)
    run = trained(job, lambda run: disturb(run, at))
    found = final_state(job)
    assert found.keys() == undisturbed.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, undisturbed[name]), name
    (event,) = told(job)
    assert event["at"] == where
    assert event["setting"] == run.parts.fitting.setting.plain()
    assert event["said"] == "a test's"
    assert event["done"]


@pytest.mark.slow
def test_a_fused_backward_pass_that_ran_out_is_replayed_from_before_it_moved(make_job: MakeJob):
    more = {
        "memory__fused_backward": True,
        "optimizer__max_grad_norm": 0,
        "training__images_per_step": 1,
        **ROOM,
    }
    plain, broken = make_job(name="plain", **more), make_job(name="broken", **more)
    trained(plain)

    def late_in_backward(run: Run) -> None:
        assert run.parts.fused
        move, check = run.parts.fused._move, once(150)  # many have moved by then

        def limited(leaves: Any) -> None:
            check()
            move(leaves)

        run.parts.fused._move = limited  # type: ignore[method-assign]

    trained(broken, late_in_backward)
    (event,) = told(broken)
    assert event["at"] == "step 1"
    one, other = final_state(plain), final_state(broken)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_when_nothing_is_left_the_run_ends_with_what_to_change(make_job: MakeJob):
    job = make_job(memory__checkpointing="none", memory__streaming=0, **ROOM)

    def never_enough(run: Run) -> None:
        def refuse(*given: Any) -> Tensor:
            raise torch.OutOfMemoryError("2 bytes are asked for\nand more words")

        run.parts.predict = refuse

    with pytest.raises(MemoryPlanError, match="Out of memory at step 1") as caught:
        trained(job, never_enough)
    said = str(caught.value)
    assert "2 bytes are asked for" in said
    assert "and more words" not in said
    assert "checkpointing none" in said
    assert "memory.base" in said
    tried = [row["setting"] for row in told(job)]
    assert tried[0]["micro_batch"] == 2
    assert all(one["checkpointing"] == "none" and one["streamed"] == 0 for one in tried)


class Watched:
    """What a setting is applied to, which may refuse some."""

    def __init__(self, refuses: Callable[[Setting], bool] = lambda setting: False) -> None:
        self.applied: list[Setting] = []
        self._refuses = refuses

    def apply(self, setting: Setting) -> None:
        self.applied.append(setting)
        if self._refuses(setting):
            raise torch.OutOfMemoryError("placing")


def test_only_what_the_job_leaves_open_is_done():
    options = MemoryOptions(checkpointing="none", streaming=0.5, host_states=False)
    fitting = Fitting(Setting(streamed=0.5, micro_batch=4), options=options)
    check, tried = once(0), []

    def refused() -> None:
        tried.append(fitting.setting)
        check()
        raise torch.OutOfMemoryError("always")

    with pytest.raises(MemoryPlanError):
        fitting.again(refused, "a test")
    assert [one.micro_batch for one in tried[:3]] == [4, 2, 1]
    assert {one.checkpointing for one in tried} == {"none"}
    assert {one.streamed for one in tried} == {0.5}
    assert not any(one.host_states for one in tried)


def test_where_memory_is_cached_the_same_is_tried_once_more_and_once_a_setting():
    fitting = Fitting(Setting(micro_batch=4), retries=True)
    tried: list[int] = []

    def refused() -> None:
        tried.append(fitting.setting.micro_batch)
        if len(tried) < 5:
            raise torch.OutOfMemoryError("still")

    fitting.again(refused, "a test")
    assert tried == [4, 4, 2, 2, 1]


def test_a_setting_that_cannot_be_applied_is_passed_over():
    watched = Watched(lambda setting: setting.micro_batch == 2)
    fitting = Fitting(Setting(micro_batch=4))
    fitting.take([watched])
    fitting.again(once(1), "a test")
    assert fitting.setting.micro_batch == 1
    assert [one.micro_batch for one in watched.applied] == [4, 2, 1]


def test_what_happens_before_somebody_keeps_it_is_told_then():
    fitting = Fitting(Setting(micro_batch=2))
    fitting.again(once(1), "placing")
    kept: list[tuple[str, dict[str, Any]]] = []
    fitting.tell_to(lambda kind, **facts: kept.append((kind, facts)))
    fitting.tell("more", step=1)
    assert [kind for kind, _ in kept] == ["out of memory", "more"]
    assert kept[0][1]["done"] == "micro_batch 2 -> 1"


def test_what_only_made_steps_faster_goes_before_a_strategy_is_added():
    fitting, held, tries = Fitting(Setting(micro_batch=2)), [True], 0
    fitting.spare(lambda: bool(held) and held.pop())

    def check() -> None:
        nonlocal tries
        tries += 1
        if held or tries < 3:
            raise torch.OutOfMemoryError("more is asked for")

    fitting.again(check, "a test")
    assert (tries, held, fitting.setting) == (3, [], Setting(micro_batch=1))


def test_where_nothing_can_be_repeated_a_run_ends_with_a_sentence(make_job: MakeJob):
    run = open_run(make_job(**ROOM))
    run.trial = None

    def refuse(step: int) -> Any:
        raise torch.OutOfMemoryError("2 bytes are asked for\nand more words")

    run.parts.loader.take = refuse  # type: ignore[method-assign]
    with pytest.raises(MemoryPlanError, match=r"2 bytes are asked for\. Free the device"):
        run_training(run)
    run.close()
