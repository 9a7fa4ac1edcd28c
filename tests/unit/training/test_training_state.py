"""What a run carries from one step to the next: out of its parts, through a file, and back."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from small import MakeJob, open_run

from raylora.training.checkpoint import State
from raylora.training.reduce import Alone
from raylora.training.state import copy_state_from_first, held_state, restore_state
from raylora.training.step import train_step


@pytest.mark.slow
def test_values_average_optimizer_and_loss_scale_come_back_bit_for_bit(make_job: MakeJob):
    job = make_job(training__precision="fp16", training__images_per_step=1, ema__decay=0.9)
    run = open_run(job)
    for step in range(2):
        train_step(run.parts, step + 2)
    run.parts.loss_scale.overflowed()
    run.parts.loss_scale.passed()
    tensors, facts = held_state(run.parts)
    told = json.loads(json.dumps(facts))
    state = State(2, {name: tensor.clone() for name, tensor in tensors.items()}, told)
    run.close()
    other = open_run(job)
    restore_state(other.parts, state)
    again, facts_again = held_state(other.parts)
    assert facts_again == facts
    assert facts["loss_scale"] == {"factor": 2.0**15, "clean": 1}
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor), name
    assert not torch.equal(again["ema"], again["values"])
    other.close()


@pytest.mark.slow
def test_what_is_not_trained_is_kept_and_never_moved(make_job: MakeJob):
    job = make_job(
        network__start="pissa", network__rank=2, training__images_per_step=1, ema__decay=0.9
    )
    run = open_run(job)
    constants = run.parts.adapter.constants.clone()
    assert constants.any()
    for step in range(2):
        train_step(run.parts, step + 2)
    assert torch.equal(run.parts.adapter.constants, constants)
    tensors, facts = held_state(run.parts)
    assert torch.equal(tensors["constants"], constants)
    assert len(tensors["ema"]) == len(tensors["values"]) == len(run.parts.adapter.values)
    state = State(2, {name: tensor.clone() for name, tensor in tensors.items()}, facts)
    # as another machine's decomposition would have it
    run.parts.adapter.constants += 1e-3
    restore_state(run.parts, state)
    assert torch.equal(run.parts.adapter.constants, constants)
    run.close()


@pytest.mark.slow
def test_workers_begin_with_the_first_ones_constants(make_job: MakeJob):
    class Second(Alone):
        """Worker 1 of two; the first has ones everywhere."""

        def copy_from_first(self, tensor: torch.Tensor) -> None:
            if tensor.is_floating_point():
                tensor.fill_(1.0)

    run = open_run(make_job(network__freeze_down=True, training__images_per_step=1))
    parts = dataclasses.replace(run.parts, group=Second())
    copy_state_from_first(parts)
    assert (parts.adapter.constants == 1).all()
    assert (parts.adapter.values == 1).all()
    run.close()
