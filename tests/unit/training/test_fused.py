"""A fused backward pass moves the adapter as the plain step does, and holds no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import MakeJob, final_state, open_run
from torch import Tensor

from raylora.assemble import open_store
from raylora.base.errors import JobError
from raylora.job import Job
from raylora.training.checkpoint import read_checkpoint
from raylora.training.loop import Run, run_training
from raylora.training.report import read_metrics
from raylora.training.step import train_step

FUSED: dict[str, dict[str, Any]] = {
    "each": {"memory__fused_backward": True},
    "bundles": {"memory__fused_groups": 3},
}
EVERYTHING: dict[str, Any] = {
    "network__train": "both",
    "network__max_norm": 0.01,
    "optimizer__lora_plus_ratio": 4.0,
    "optimizer__text_encoder_rate": 1e-3,
    "optimizer__text_encoder_stop": 0.5,
    "optimizer__learning_rate": -1e-3,
    "ema__decay": 0.9,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job_of(make_job: MakeJob, **given: Any) -> Job:
    plain = {
        "optimizer__max_grad_norm": 0.0,
        "training__steps": 4,
        "training__images_per_step": 2,
        "network__rank": 4,
        "schedule__warmup_steps": 1,
    }
    return make_job(**{**plain, **given})


def trained(job: Job) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    run = open_run(job, report=True)
    try:
        run_training(run)
    finally:
        run.close()
    return final_state(job), [row for row in read_metrics(open_store(job)) if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("way", FUSED)
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd_nesterov"])
def test_the_fused_run_ends_on_the_bits_of_the_plain_one(make_job: MakeJob, name: str, way: str):
    given = {"optimizer__name": name, "optimizer__learning_rate": None}
    plain, told = trained(job_of(make_job, name="plain", **given))
    fused, fused_told = trained(job_of(make_job, name="fused", **given, **FUSED[way]))
    assert torch.equal(fused["values"], plain["values"])
    assert [row["loss"] for row in fused_told] == [row["loss"] for row in told]
    norms = [[row["gradient_norm"] for row in rows] for rows in (fused_told, told)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # float32 sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("way", FUSED)
def test_all_that_surrounds_a_move_is_as_in_the_plain_step(make_job: MakeJob, way: str):
    """Rates by part, LoRA+, a part that stops, a turned sign, the cap and the average."""
    plain, told = trained(job_of(make_job, name="plain", **EVERYTHING))
    fused, fused_told = trained(job_of(make_job, name="fused", **EVERYTHING, **FUSED[way]))
    for word in ("values", "ema"):
        assert torch.equal(fused[word], plain[word]), word
    assert fused_told[-1]["rates"] == told[-1]["rates"]
    capped = [rows[-1]["extra"]["capped_layers"] for rows in (fused_told, told)]
    assert capped[0] == capped[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("way", FUSED)
def test_layers_that_no_gradient_reaches_hide_no_part_of_its_norm(make_job: MakeJob, way: str):
    unread = {"network__train": "both", "family__clip_skip": 2}  # the last layer of the encoder
    plain, told = trained(job_of(make_job, name="plain", **unread))
    fused, fused_told = trained(job_of(make_job, name="fused", **unread, **FUSED[way]))
    assert torch.equal(fused["values"], plain["values"])
    norms = [[row["gradient_norm"] for row in rows] for rows in (fused_told, told)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # float32 sums in another order


@pytest.mark.slow
def test_eight_bit_states_of_single_leaves_move_about_as_those_of_the_whole(make_job: MakeJob):
    pytest.importorskip("bitsandbytes")
    given = {"optimizer__name": "adamw8bit", "network__rank": 60}
    plain, _ = trained(job_of(make_job, name="plain", **given))
    fused, _ = trained(job_of(make_job, name="fused", **given, memory__fused_backward=True))
    start = open_run(job_of(make_job, name="start", **given))
    began = start.parts.adapter.values.detach()
    start.close()
    moved = (plain["values"] - began).norm()
    assert not torch.equal(plain["values"], fused["values"])
    # blocks of 256 begin elsewhere, and leaves below 4096 numbers stay in 32 bits
    assert (fused["values"] - plain["values"]).norm() < 0.1 * moved


@pytest.mark.slow
def test_a_fused_run_that_was_killed_goes_on_bit_for_bit(make_job: MakeJob):
    given = {**FUSED["bundles"], "training__save_every_steps": 2}
    job = job_of(make_job, name="fused", **given)
    whole, told = trained(job)
    storage = open_store(job)
    for entry in storage.entries("checkpoints/000004"):
        storage.delete(entry.key)
    again, _ = trained(job)
    assert again.keys() == whole.keys()
    for word, tensor in whole.items():
        assert torch.equal(again[word], tensor), word
    assert len(told) == 4
    assert not torch.equal(read_checkpoint(storage, 2).tensors["values"], whole["values"])


def runs_out_once(run: Run, leaves: int) -> None:
    """Let the next backward pass run out of memory when so many leaves have their gradients."""
    seen: list[int] = []

    def hook(leaf: Tensor) -> None:
        seen.append(1)
        if len(seen) == leaves:
            raise torch.OutOfMemoryError("a test's")

    for held in run.parts.adapter.parameters.values():
        for leaf in held.values():
            leaf.register_post_accumulate_grad_hook(hook)


@pytest.mark.slow
@pytest.mark.parametrize("way", FUSED)
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("leaves", [1, 100])
def test_running_out_of_memory_half_way_through_a_move_loses_nothing(
    make_job: MakeJob, way: str, before: int, leaves: int
):
    ends = []
    for name in ("whole", "broken"):
        run = open_run(job_of(make_job, name=name, memory__max_micro_batch=2, **FUSED[way]))
        for step in range(before):
            train_step(run.parts, step)
        start = run.parts.adapter.values.detach().clone()
        if name == "broken":
            runs_out_once(run, leaves)
        again = run.parts.fitting.again
        run.parts.fitting.again = lambda action, where, again=again: twice(action)  # type: ignore
        results = [train_step(run.parts, step) for step in (before, before + 1)]
        ends.append((run.parts.adapter.values.detach(), torch.stack([r.loss for r in results])))
        assert not torch.equal(start, ends[-1][0])
        run.close()
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def twice(action: Any) -> Any:
    """Begin it again as it was, as where memory was given back."""
    try:
        return action()
    except torch.OutOfMemoryError:
        return action()


@pytest.mark.slow
def test_a_step_of_two_buckets_moves_once(make_job: MakeJob):
    """Then there are two micro-batches however large they may be."""
    ends = []
    for way in ({}, FUSED["each"], FUSED["bundles"]):
        run = open_run(job_of(make_job, name=f"n{len(ends)}", **way))
        if run.parts.fused is None:
            run.parts.fitting.apply(run.parts.fitting.setting.but(micro_batch=1))
        else:
            run.parts.fitting.setting = run.parts.fitting.setting.but(micro_batch=1)
        for step in range(2):
            train_step(run.parts, step)
        ends.append(run.parts.adapter.values.detach())
        run.close()
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def most_gradient_bytes(run: Run) -> int:
    """The most bytes of gradients that lived at once in a step, by their storages.

    There are never more than when the optimizer begins to move: only then are some dropped.
    """
    leaves = [leaf for held in run.parts.adapter.parameters.values() for leaf in held.values()]
    optimizer, found = run.parts.mover.optimizer, []
    step = optimizer.step

    def looked_at() -> None:
        storages = [leaf.grad.untyped_storage() for leaf in leaves if leaf.grad is not None]
        found.append(sum({one._cdata: one.nbytes() for one in storages}.values()))
        step()

    optimizer.step = looked_at  # type: ignore[method-assign,assignment]
    train_step(run.parts, 0)  # which tells the order that gradients come in
    found.clear()
    train_step(run.parts, 0)
    return max(found)


@pytest.mark.slow
def test_a_fused_pass_never_holds_the_whole_gradient(make_job: MakeJob):
    found = {}
    for name, way in {"plain": {}, **FUSED}.items():
        run = open_run(job_of(make_job, name=name, network__rank=16, **way))
        adapter = run.parts.adapter
        leaves = [leaf for held in adapter.parameters.values() for leaf in held.values()]
        whole, largest = adapter.values.nbytes, max(leaf.nbytes for leaf in leaves)
        found[name] = most_gradient_bytes(run)
        assert len(adapter.gradients) == (len(adapter.values) if name == "plain" else 0)
        run.close()
    assert found["plain"] == whole
    assert 0 < found["each"] <= 2 * largest  # a layer's two halves come together
    # a third each, but for where leaves end, and what has come of the next
    assert found["bundles"] <= whole / 3 + 3 * largest


@pytest.mark.slow
def test_a_pass_outside_of_a_step_moves_nothing_and_leaves_nothing(make_job: MakeJob):
    run = open_run(job_of(make_job, **FUSED["each"]))
    adapter = run.parts.adapter
    before = adapter.values.detach().clone()
    leaf = next(iter(adapter.parameters[adapter.sites[0].name].values()))
    (leaf.sum() * 3).backward()
    assert leaf.grad is None
    assert torch.equal(adapter.values.detach(), before)
    run.close()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"fleet__workers": 2}, "before 2 workers could add"),
        ({"training__sums": "exact"}, "training.sums: exact adds gradients up before"),
        ({"training__images_per_step": 9}, "memory.max_micro_batch: 9"),
        ({"memory__max_micro_batch": 1}, "micro-batches of 1"),
        ({"optimizer__max_grad_norm": 1.0}, "optimizer.max_grad_norm is 1. Set it to 0"),
        ({"training__precision": "fp16"}, "loss scaled otherwise. Choose bf16"),
        ({"training__on_nan": "skip"}, "training.on_nan is skip. Choose stop"),
        ({"optimizer__name": "prodigy", "optimizer__learning_rate": None}, "name prodigy is not"),
        ({"optimizer__name": "adamw_schedule_free"}, "adamw_schedule_free is not known to move"),
        ({"memory__host_states": True}, "memory.host_states moves it on the host"),
    ],
)
def test_what_a_fused_pass_cannot_do_is_told_when_the_job_is_read(
    make_job: MakeJob, given: dict[str, Any], told: str
):
    whole = {"schedule": {}, **FUSED["each"], **given}
    with pytest.raises(JobError, match=told):
        job_of(make_job, **whole)


def test_an_optimizer_of_another_package_is_refused_and_those_of_torch_are_not(make_job: MakeJob):
    assert job_of(make_job, **FUSED["each"], optimizer__name="torch.optim:NAdam")
    theirs = {"schedule__warmup_steps": 0, "optimizer__name": "dadaptation.dadapt_adam:DAdaptAdam"}
    with pytest.raises(JobError, match="is not known to move"):
        job_of(make_job, **FUSED["each"], **theirs)
