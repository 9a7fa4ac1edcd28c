"""What a run carries from one step to the next: out of its parts, through a file, and back."""

from __future__ import annotations

import json

import pytest
import torch
from small import MakeJob, open_run

from raylora.training.checkpoint import State
from raylora.training.state import held_state, restore_state
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
