"""What a job's words of memory do to optimizer and attention, and which of them are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import MakeJob, final_state, open_run
from torch import Tensor
from torch.testing import assert_close

from raylora.assemble import open_store
from raylora.base.errors import JobError, OptionError
from raylora.job import Job
from raylora.training.loop import run_training
from raylora.training.state import copy_state_from_first


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job_of(make_job: MakeJob, **given: Any) -> Job:
    few = {"training__steps": 4, "training__images_per_step": 2, "network__rank": 4}
    return make_job(**{**few, **given})


def trained(job: Job) -> dict[str, Tensor]:
    run = open_run(job, report=True)
    try:
        run_training(run)
    finally:
        run.close()
    return final_state(job)


@pytest.mark.slow
def test_states_on_the_host_give_the_same_run_and_the_same_checkpoint(make_job: MakeJob):
    given = {"network__max_norm": 0.05, "ema__decay": 0.9, "training__save_every_steps": 2}
    plain = trained(job_of(make_job, name="plain", **given))
    job = job_of(make_job, name="host", memory__host_states=True, **given)
    for _ in range(2):  # the second time from its checkpoint
        host = trained(job)
        assert host.keys() == plain.keys()
        for word, tensor in plain.items():
            assert torch.equal(tensor, host[word]), word
        for entry in open_store(job).entries("checkpoints/000004"):
            open_store(job).delete(entry.key)


@pytest.mark.slow
def test_workers_give_one_another_states_that_lie_on_the_host(make_job: MakeJob):
    run = open_run(job_of(make_job, memory__host_states=True))
    copy_state_from_first(run.parts)
    run_training(run)
    run.close()


@pytest.mark.slow
def test_eight_bit_states_are_those_of_the_optimizer_of_that_name(make_job: MakeJob):
    pytest.importorskip("bitsandbytes")
    named = trained(job_of(make_job, name="named", optimizer__name="adamw8bit"))
    mapped = trained(job_of(make_job, name="mapped", memory__states="8bit"))
    full = trained(job_of(make_job, name="full"))
    assert torch.equal(named["values"], mapped["values"])
    assert not torch.equal(full["values"], mapped["values"])
    assert {tensor.dtype for tensor in mapped.values()} >= {torch.uint8}


@pytest.mark.slow
def test_a_chosen_kernel_of_attention_trains_the_same_but_for_rounding(make_job: MakeJob):
    given = {"memory__checkpointing": "all"}
    by = {
        kernel: trained(job_of(make_job, name=kernel, memory__attention=kernel, **given))["values"]
        for kernel in ("auto", "flash", "math")
    }
    assert torch.equal(by["auto"], by["flash"])  # what torch chooses on a CPU
    assert not torch.equal(by["math"], by["flash"])
    assert_close(by["math"], by["flash"], rtol=1e-2, atol=1e-4)  # Adam divides small gradients


@pytest.mark.slow
def test_a_kernel_that_the_device_has_not_ends_the_run_before_it_begins(make_job: MakeJob):
    with pytest.raises(OptionError, match=r"memory\.attention is cudnn, and torch has no such"):
        open_run(job_of(make_job, memory__attention="cudnn"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"memory__states": "8bit", "optimizer__name": "adamw8bit"}, "in 8 bits already"),
        (
            {"memory__states": "8bit", "optimizer__args": {"amsgrad": True}},
            r"optimizer.args are adamw's own \(amsgrad\)",
        ),
        (
            {"memory__host_states": True, "optimizer__name": "paged_adamw8bit"},
            "Choose adamw8bit, or leave memory.host_states out",
        ),
        (
            {"memory__compile": True, "network__rank_dropout": 0.1},
            "network.rank_dropout draws anew in each of them at every step",
        ),
        ({"memory__streaming": True}, "memory.streaming is true, which is no share"),
        ({"memory__checkpointing": "some"}, "'none', 'mlp', 'alternate' or 'all'"),
        ({"memory__compile": True, "memory__streaming": 0.5}, "memory.streaming is 0.5. Set it to"),
        ({"memory__compile": True, "memory__checkpointing": "mlp"}, "Choose none, alternate or"),
        (
            {"memory__compile": True, "network": {"kind": "dylora", "rank": 4, "unit": 2}},
            "network.kind dylora trains other ranks at every step",
        ),
    ],
)
def test_words_that_do_not_go_together_are_told_when_the_job_is_read(
    make_job: MakeJob, given: dict[str, Any], told: str
):
    with pytest.raises(JobError, match=told):
        job_of(make_job, **given)
