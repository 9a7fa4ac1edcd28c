"""float16 and its loss scale, broken gradients, checkpointed blocks, dropout over micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import MakeJob, final_state, open_run
from torch import Tensor
from torch.testing import assert_close

from raylora.assemble import open_store
from raylora.base.errors import TrainingError
from raylora.training.loop import Run, run_training
from raylora.training.report import read_metrics
from raylora.training.step import StepResult, train_step


def spoil(run: Run, value: float, calls: set[int]) -> None:
    """Some calls of the denoiser give a number that is none."""
    predict, count = run.parts.predict, [0]

    def spoilt(*given: Any) -> Tensor:
        count[0] += 1
        found = predict(*given)
        return found * value if count[0] - 1 in calls else found

    run.parts.predict = spoilt


@pytest.mark.slow
def test_fp16_trains_as_fp32_does_to_its_rounding(make_job: MakeJob):
    moves = []
    for precision in ("fp32", "fp16"):
        run = open_run(make_job(training__precision=precision, optimizer__name="torch.optim:SGD"))
        train_step(run.parts, 1)
        moves.append(run.parts.adapter.gradients.clone())
        assert run.parts.adapter.values.dtype == torch.float32
        run.close()
    distance = (moves[0] - moves[1]).norm() / moves[0].norm()
    assert 0 < distance < 0.02  # 11 bits of mantissa through some 60 layers


@pytest.mark.slow
def test_an_overflow_in_fp16_replays_the_step_with_half_the_scale(make_job: MakeJob):
    results = {}
    for broken in (False, True):
        run = open_run(make_job(training__precision="fp16", memory__max_micro_batch=4))
        parts = run.parts
        if broken:
            spoil(run, float("inf"), {0, 1})  # the first two tries of step 0
        else:
            parts.loss_scale.factor /= 4
        result = train_step(parts, 0)
        assert not result.skipped
        assert result.extra["loss_scale"] == 2.0**14
        results[broken] = (parts.adapter.values.detach().clone(), float(result.loss))
        run.close()
    assert torch.equal(results[True][0], results[False][0])
    assert results[True][1] == results[False][1]


@pytest.mark.parametrize("sums", ["fast", "exact"])
def test_scaling_by_powers_of_two_changes_no_bit_where_nothing_underflows(
    make_job: MakeJob, sums: str
):
    found = []
    for scale in (1.0, 2.0**10):
        run = open_run(
            make_job(training__precision="fp64", training__images_per_step=2, training__sums=sums)
        )
        run.parts.loss_scale.factor = scale
        train_step(run.parts, 1)
        found.append(run.parts.adapter.gradients.clone())
        run.close()
    assert found[0].any()
    assert torch.equal(found[0], found[1])


@pytest.mark.slow
def test_a_broken_step_is_skipped_where_that_is_asked_for(make_job: MakeJob):
    job = make_job(training__on_nan="skip", memory__max_micro_batch=4, schedule__warmup_steps=0)
    run = open_run(job, report=True)
    spoil(run, float("nan"), {2})
    run_training(run)
    run.close()
    rows = {row["done"]: row for row in read_metrics(open_store(job)) if "loss" in row}
    assert len(rows) == 6
    assert [done for done, row in rows.items() if row.get("skipped")] == [3]
    state = final_state(job)
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())


@pytest.mark.slow
def test_ten_broken_steps_in_a_row_end_the_run(make_job: MakeJob):
    job = make_job(
        training__on_nan="skip", training__steps=20, training__images_per_step=1, log__every_steps=1
    )
    run = open_run(job, report=True)
    spoil(run, float("nan"), {*range(9), *range(10, 20)})
    with pytest.raises(TrainingError, match="of 10 steps in a row, up to step 20, were not finite"):
        run_training(run)
    run.close()


def test_a_skipped_step_moves_nothing(make_job: MakeJob):
    run = open_run(make_job(training__on_nan="skip", training__images_per_step=1, ema__decay=0.5))
    train_step(run.parts, 1)
    before = run.parts.adapter.values.detach().clone()
    average = run.parts.ema.average.clone()  # type: ignore[union-attr]
    spoil(run, float("nan"), {0})
    result = train_step(run.parts, 2)
    assert result.skipped
    assert torch.equal(run.parts.adapter.values, before)
    assert torch.equal(run.parts.ema.average, average)  # type: ignore[union-attr]
    assert not train_step(run.parts, 3).skipped
    assert not torch.equal(run.parts.adapter.values, before)
    run.close()


def counted(run: Run) -> tuple[StepResult, int]:
    """A step, and how many numbers were kept for its backward pass."""
    held: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = train_step(run.parts, 1)
    return result, sum(held)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["denoiser", "both"])
def test_checkpointed_blocks_give_the_same_bits(make_job: MakeJob, train: str):
    found, kept = [], []
    for on in (False, True):
        run = open_run(
            make_job(
                network__train=train,
                network__dropout=0.2,
                memory__checkpointing="all" if on else "none",
                memory__max_micro_batch=2,
            )
        )
        result, numbers = counted(run)
        kept.append(numbers)
        found.append((run.parts.adapter.gradients.clone(), result.loss))
        run.close()
    assert kept[1] < kept[0] / 2, "fewer numbers are kept for the backward pass"
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.slow
def test_dropout_is_the_same_in_any_micro_batch(make_job: MakeJob):
    losses, values = [], []
    for size in (1, 4):
        run = open_run(
            make_job(
                training__precision="fp64",
                network__dropout=0.3,
                network__rank_dropout=0.3,
                network__module_dropout=0.3,
                memory__max_micro_batch=size,
            )
        )
        losses.append(torch.tensor([float(train_step(run.parts, n).loss) for n in range(3)]))
        values.append(run.parts.adapter.values.detach())
        run.close()
    plain = open_run(make_job(training__precision="fp64"))
    without = torch.tensor([float(train_step(plain.parts, n).loss) for n in range(3)])
    plain.close()
    assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    assert_close(values[0], values[1], rtol=0, atol=1e-10)
    assert not torch.allclose(losses[0], without)


def test_what_no_smaller_scale_mends_is_not_skipped_unless_that_is_asked_for(make_job: MakeJob):
    run = open_run(make_job(training__precision="fp16", training__images_per_step=1))
    run.parts.loss_scale.factor = 2.0
    spoil(run, float("nan"), {0, 1})
    result = train_step(run.parts, 1)
    assert run.parts.loss_scale.factor == 2.0  # as before the step: scaling was not to blame
    assert not result.skipped, "the run is to stop, and says why"
    assert result.gradient_norm.isnan()
    run.close()
